# pybind11, for what is not a tensor op (csrc/ring). Sets LCTX_PYBIND11_VERSION and
# LCTX_PYBIND11_MISSING ("" when usable, and then the target pybind11::module exists).
set(LCTX_PYBIND11_MIN 2.12)
set(LCTX_PYBIND11_VERSION "")
set(LCTX_PYBIND11_MISSING "")
execute_process(
  COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)

if(NOT Python_Development.Module_FOUND)
  set(LCTX_PYBIND11_MISSING "Python.h was not found; install Python's headers (python3-dev)")
else()
  find_package(pybind11 CONFIG QUIET HINTS "${pybind11_dir}")
  if(NOT pybind11_FOUND)
    set(LCTX_PYBIND11_MISSING
        "pybind11 was not found; pip install 'pybind11>=${LCTX_PYBIND11_MIN}'")
  elseif(pybind11_VERSION VERSION_LESS LCTX_PYBIND11_MIN)
    set(LCTX_PYBIND11_MISSING
        "pybind11 ${pybind11_VERSION} is too old, ${LCTX_PYBIND11_MIN} is needed")
  else()
    set(LCTX_PYBIND11_VERSION "${pybind11_VERSION}")
  endif()
endif()
