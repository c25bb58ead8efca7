// The Python module loraforge._C: what was built, and what this processor can run. No torch header, so that it compiles
// in seconds and answers even where an operator is missing. Importing it registers the operators of the other files.
#include <pybind11/pybind11.h>

#include "common/interface.h"
#include "common/isa.h"

namespace py = pybind11;

#define LF_TEXT_(x) #x
#define LF_TEXT(x) LF_TEXT_(x)

namespace {

py::dict build_info() {
  py::dict info;
  info["interface"] = loraforge::kInterface;
  info["compiler"] = __VERSION__;
  info["cxx"] = static_cast<long>(__cplusplus);
  info["torch"] = LF_TEXT(LORAFORGE_TORCH_VERSION);
  info["torch_target"] = LF_TEXT(LORAFORGE_TORCH_TARGET);
  info["pybind11"] = LF_TEXT(PYBIND11_VERSION_MAJOR) "." LF_TEXT(PYBIND11_VERSION_MINOR);
  info["multiversioned"] = static_cast<bool>(LORAFORGE_HAS_CLONES);
#ifdef LORAFORGE_NATIVE
  info["native_flags"] = true;
#else
  info["native_flags"] = false;
#endif
#ifdef LORAFORGE_CUDA_ARCHS
  info["devices"] = py::make_tuple("cpu", "cuda");
  info["cuda_archs"] = LF_TEXT(LORAFORGE_CUDA_ARCHS);
#else
  info["devices"] = py::make_tuple("cpu");
#endif
  return info;
}

// The instruction set that the loader picked for the hot loops.
const char* running_isa() {
#if LORAFORGE_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return "x86-64-v4";
  }
  return __builtin_cpu_supports("x86-64-v3") ? "x86-64-v3" : "x86-64";
#else
  return "as compiled";
#endif
}

py::dict capabilities() {
  py::dict found;
  found["isa"] = running_isa();
#if defined(__x86_64__)
  found["machine"] = "x86-64";
#elif defined(__aarch64__)
  found["machine"] = "aarch64";
#else
  found["machine"] = "other";
#endif
  return found;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of loraforge (torch.ops.loraforge.*)";
  m.def("build_info", &build_info, "What the module was built from and with.");
  m.def("capabilities", &capabilities, "What the processor at hand runs.");
}
