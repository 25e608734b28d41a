// Makes the library importable as lctx_kernels._C. The module is empty: loading the library
// registers the ops. Without the Python headers the library still builds; lctx_kernels loads it
// with torch.ops.load_library.
#if __has_include(<Python.h>)
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
#endif
