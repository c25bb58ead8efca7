// entry_merge, entry_counts_ and drop_rescale_ on CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "../common/layout.h"
#include "../common/operands.h"
#include "entrywise.h"
#include "glue.h"

namespace loraforge::cuda {
namespace {

constexpr uint64_t kAll = uint64_t{1} << 32;

// The tensors that a source points into.
struct Held {
  Tensor left;
  std::optional<Tensor> right;
  EntrySource source;
};

Held hold(const char* op, const Tensor& left, const Tensor* right, double scaling) {
  EntrySource source{};
  source.scaling = scaling;
  if (!right) {
    check_devices(op, {{"left", left}});
    Held held{unit_stride(left), std::nullopt, source};
    held.source.kind = float_of(left);
    held.source.left = held.left.const_data_ptr();
    held.source.ld_left = held.left.stride(0);
    return held;
  }
  check_devices(op, {{"left", left}, {"right", *right}});
  Held held{unit_stride(left), unit_stride(*right), source};
  held.source.kind = Float::f64;
  held.source.left = held.left.const_data_ptr();
  // A tensor without entries may have no address, and null would say that the update is dense.
  static const double nothing = 0.0;
  held.source.right = held.right->numel() == 0 ? &nothing : held.right->const_data_ptr<double>();
  held.source.ld_left = held.left.stride(0);
  held.source.ld_right = held.right->stride(0);
  held.source.r = left.size(1);
  return held;
}

int64_t columns_of(const Held& held) {
  return held.right ? held.right->size(1) : held.left.size(1);
}

Tensor merge(
    std::vector<Tensor> left, std::vector<Tensor> right, std::vector<double> scaling, std::vector<double> weights,
    std::vector<double> low, std::vector<double> high, std::vector<int64_t> keys, int64_t limit, double gain,
    int64_t first, bool elect, ScalarType dtype) {
  constexpr const char* op = "entry_merge";
  const size_t count = left.size();
  check_entry_merge(left, right, scaling, weights, low, high, keys, limit, dtype);
  const Float kind = dtype == ScalarType::Float ? Float::f32 : Float::f64;
  const DeviceGuard guard(left[0].get_device_index());
  std::vector<Held> held;
  std::vector<EntrySource> sources;
  for (size_t i = 0; i < count; ++i) {
    check_devices(op, {{"left", left[0]}, {"left", left[i]}});
    held.push_back(hold(op, left[i], right.empty() ? nullptr : &right[i], scaling[i]));
    EntrySource source = held.back().source;
    source.weight = weights[i];
    source.low = low[i];
    source.high = high[i];
    source.key = {static_cast<uint64_t>(keys[2 * i]), static_cast<uint64_t>(keys[2 * i + 1])};
    sources.push_back(source);
  }
  const int64_t t = left[0].size(0), n = columns_of(held[0]);
  Tensor out = torch::stable::new_empty(left[0], {t, n}, dtype);
  std::optional<Tensor> sizes, votes;
  if (elect && count > static_cast<size_t>(kEntrySources)) {
    sizes = torch::stable::new_empty(left[0], {t, n}, dtype);
    votes = torch::stable::new_empty(left[0], {t, n}, ScalarType::Int);
  }
  const EntryRule rule{
      static_cast<uint64_t>(limit), gain, static_cast<uint64_t>(first) * static_cast<uint64_t>(n), elect};
  check_launch(
      op, entry_merge(
              kind, sources.data(), static_cast<int>(count), rule, t, n, out.mutable_data_ptr(),
              sizes ? sizes->mutable_data_ptr() : nullptr,
              votes ? static_cast<int*>(votes->mutable_data_ptr()) : nullptr, stream_of(left[0])));
  return out;
}

void counts_(
    Tensor counts, const Tensor& left, std::optional<Tensor> right, double scaling, ScalarType dtype, bool wide,
    std::vector<int64_t> prefixes, int64_t low, int64_t high) {
  constexpr const char* op = "entry_counts_";
  check_entry_counts(counts, left, right ? &*right : nullptr, dtype, wide, prefixes.size(), low, high);
  check_devices(op, {{"counts", counts}, {"left", left}});
  const Float kind = dtype == ScalarType::Float ? Float::f32 : Float::f64;
  const DeviceGuard guard(left.get_device_index());
  const Held held = hold(op, left, right ? &*right : nullptr, scaling);
  check_launch(
      op, entry_counts(
              kind, wide, held.source, prefixes.data(), static_cast<int>(prefixes.size()), static_cast<int>(low),
              static_cast<int>(high), left.size(0), columns_of(held), counts.mutable_data_ptr<int64_t>(),
              stream_of(left)));
}

void drop_(Tensor tile, int64_t key_low, int64_t key_high, int64_t first, int64_t limit, double gain) {
  constexpr const char* op = "drop_rescale_";
  check_drop_rescale(tile, limit);
  check_devices(op, {{"tile", tile}});
  const DeviceGuard guard(tile.get_device_index());
  Tensor rows = unit_stride(tile);
  const PhiloxKey key{static_cast<uint64_t>(key_low), static_cast<uint64_t>(key_high)};
  const EntryRule rule{
      static_cast<uint64_t>(limit), gain, static_cast<uint64_t>(first) * static_cast<uint64_t>(tile.size(1)), false};
  check_launch(
      op, drop_rescale(
              float_of(tile), rows.mutable_data_ptr(), rows.stride(0), tile.size(0), tile.size(1), key, rule,
              stream_of(tile)));
  if (rows.const_data_ptr() != tile.const_data_ptr()) {
    torch::stable::copy_(tile, rows);
  }
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CUDA, m) {
  m.impl("entry_merge", TORCH_BOX(&merge));
  m.impl("entry_counts_", TORCH_BOX(&counts_));
  m.impl("drop_rescale_", TORCH_BOX(&drop_));
}

} // namespace loraforge::cuda
