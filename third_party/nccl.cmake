# NCCL, for the ring communicator. Sets LCTX_NCCL_INCLUDE_DIR, LCTX_NCCL_VERSION and
# LCTX_NCCL_MISSING ("" when usable). The header beside torch comes first: at run time the library
# that torch has loaded is used, so their versions agree.
set(LCTX_NCCL_MIN 2.19)
set(LCTX_NCCL_VERSION "")
set(LCTX_NCCL_MISSING "")
find_path(LCTX_NCCL_INCLUDE_DIR nccl.h NO_CACHE PATH_SUFFIXES include
  HINTS "${LCTX_TORCH_DIR}/../nvidia/nccl/include" ENV NCCL_HOME ENV NCCL_ROOT)

if(NOT LCTX_NCCL_INCLUDE_DIR)
  set(LCTX_NCCL_MISSING "nccl.h was not found; pip install nvidia-nccl-cu13 or set NCCL_HOME")
else()
  set(defines "^#define NCCL_(MAJOR|MINOR|PATCH) +[0-9]+")
  file(STRINGS "${LCTX_NCCL_INCLUDE_DIR}/nccl.h" nccl_lines REGEX "${defines}")
  string(REGEX REPLACE "#define NCCL_[A-Z]+ +" "" nccl_lines "${nccl_lines}")
  string(REPLACE ";" "." LCTX_NCCL_VERSION "${nccl_lines}")
  if(LCTX_NCCL_VERSION VERSION_LESS LCTX_NCCL_MIN)
    set(LCTX_NCCL_MISSING "NCCL ${LCTX_NCCL_VERSION} is too old, ${LCTX_NCCL_MIN} is needed")
  endif()
endif()
