// Number of the agreement between the compiled operators and loraforge/kernels. Raise it, there and here, when a schema
// changes, so that a build left over from older sources is refused with a clear word and not called with wrong arguments.
#pragma once

namespace loraforge {
constexpr int kInterface = 2;
} // namespace loraforge
