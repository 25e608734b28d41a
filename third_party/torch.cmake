# Torch's stable headers and libraries, found without importing torch. Sets LCTX_TORCH_DIR and
# LCTX_TORCH_VERSION; makes the target lctx_torch. A library built against any torch >=
# LCTX_TORCH_MIN runs on every other one: only the stable C interface is used.
set(LCTX_TORCH_MIN 2.11)

execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
  OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT found)
  lctx_fail("no torch in the environment of ${Python_EXECUTABLE}"
            "install torch>=${LCTX_TORCH_MIN} first, then: pip install --no-build-isolation .")
endif()
list(GET found 0 LCTX_TORCH_DIR)
list(GET found 1 LCTX_TORCH_VERSION)
if(LCTX_TORCH_VERSION VERSION_LESS LCTX_TORCH_MIN)
  lctx_fail("torch ${LCTX_TORCH_VERSION} in ${LCTX_TORCH_DIR} is too old"
            "run: pip install 'torch>=${LCTX_TORCH_MIN}'")
endif()
if(NOT EXISTS "${LCTX_TORCH_DIR}/include/torch/csrc/stable/library.h")
  lctx_fail("torch ${LCTX_TORCH_VERSION} in ${LCTX_TORCH_DIR} has no C++ headers"
            "install a torch with include/torch/csrc/stable, as every official wheel has")
endif()

string(REGEX MATCH "^([0-9]+)\\.([0-9]+)" _ "${LCTX_TORCH_MIN}")
math(EXPR target_version "(${CMAKE_MATCH_1} << 56) | (${CMAKE_MATCH_2} << 48)"
     OUTPUT_FORMAT HEXADECIMAL)

add_library(lctx_torch INTERFACE)
target_include_directories(lctx_torch SYSTEM INTERFACE "${LCTX_TORCH_DIR}/include")
target_compile_definitions(lctx_torch INTERFACE TORCH_TARGET_VERSION=${target_version})
# --no-as-needed: on CUDA builds of torch, the weak stream symbol binds through libtorch's own
# dependencies, and only if libtorch stays in the list of ours.
target_link_libraries(lctx_torch INTERFACE "-L${LCTX_TORCH_DIR}/lib"
  -Wl,--push-state,--no-as-needed -ltorch -ltorch_cpu -lc10 -Wl,--pop-state)
