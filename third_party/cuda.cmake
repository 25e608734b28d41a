# The CUDA compiler. Sets LCTX_CUDA_SKIPPED to the reason why CUDA kernels are not built, or to ""
# with the CUDA language enabled; LCTX_CUDA_ARCHS; LCTX_NVCC_VERSION.
# LCTX_CUDA = auto | on | off, from the environment or -D; "on" makes every reason an error.
set(LCTX_CUDA_ARCHS 9.0a)  # the architectures that csrc/cuda has kernels for
set(LCTX_CUDA_SKIPPED "")
set(LCTX_NVCC_VERSION "")

if(DEFINED ENV{LCTX_CUDA})
  set(LCTX_CUDA "$ENV{LCTX_CUDA}")
elseif(NOT DEFINED LCTX_CUDA)
  set(LCTX_CUDA auto)
endif()
if(NOT LCTX_CUDA MATCHES "^(auto|on|off)$")
  lctx_fail("LCTX_CUDA=${LCTX_CUDA} is not understood" "use LCTX_CUDA=auto, on or off")
endif()

macro(lctx_skip_cuda reason hint)
  if(LCTX_CUDA STREQUAL "on")
    lctx_fail("LCTX_CUDA=on, but ${reason}" "${hint}")
  endif()
  set(LCTX_CUDA_SKIPPED "${reason}")
endmacro()

# TORCH_CUDA_ARCH_LIST, if it is set, says which GPUs the user builds for: "8.0;9.0a+PTX".
set(wanted_archs "$ENV{TORCH_CUDA_ARCH_LIST}")
string(REGEX MATCHALL "[^ ,;]+" wanted_list "${wanted_archs}")
foreach(arch IN LISTS wanted_list)
  if(NOT arch MATCHES "^[0-9]+\\.[0-9][af]?(\\+PTX)?$")
    lctx_fail("TORCH_CUDA_ARCH_LIST=${wanted_archs}: '${arch}' is not an architecture"
              "use numbers such as 9.0a (the kernels need a Hopper GPU), or unset it")
  endif()
endforeach()

find_program(LCTX_NVCC nvcc NO_CACHE PATH_SUFFIXES bin
  HINTS "$ENV{CUDACXX}" ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda)
if(LCTX_CUDA STREQUAL "off")
  set(LCTX_CUDA_SKIPPED "LCTX_CUDA=off")
elseif(wanted_list AND NOT wanted_archs MATCHES "9\\.0")
  lctx_skip_cuda("TORCH_CUDA_ARCH_LIST=${wanted_archs} names no Hopper GPU"
                 "the kernels need 9.0a: add it, or unset TORCH_CUDA_ARCH_LIST")
elseif(NOT LCTX_NVCC)
  lctx_skip_cuda("nvcc was not found"
                 "install the CUDA toolkit >= 12.4 or set CUDA_HOME; LCTX_CUDA=off builds without")
else()
  execute_process(COMMAND "${LCTX_NVCC}" --version OUTPUT_VARIABLE nvcc_text ERROR_QUIET)
  string(REGEX MATCH "V([0-9.]+)" _ "${nvcc_text}")
  set(LCTX_NVCC_VERSION "${CMAKE_MATCH_1}")
  set(probe "${CMAKE_BINARY_DIR}/CMakeFiles/probe.cu")
  file(WRITE "${probe}" "__global__ void probe() {}\n")
  execute_process(
    COMMAND "${LCTX_NVCC}" -std=c++17 -gencode arch=compute_90a,code=sm_90a
            -ccbin "${CMAKE_CXX_COMPILER}" -c "${probe}" -o "${probe}.o"
    RESULT_VARIABLE probe_failed OUTPUT_VARIABLE probe_text ERROR_VARIABLE probe_text)
  if(probe_failed)
    string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" probe_line "${probe_text}")
    lctx_skip_cuda("nvcc ${LCTX_NVCC_VERSION} cannot compile for sm_90a: ${probe_line}"
                   "use CUDA >= 12.4 and a C++ compiler it supports; LCTX_CUDA=off builds without")
  endif()
endif()

if(LCTX_CUDA_SKIPPED STREQUAL "")
  set(CMAKE_CUDA_COMPILER "${LCTX_NVCC}")
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
  set(CMAKE_CUDA_ARCHITECTURES 90a-real)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
endif()
