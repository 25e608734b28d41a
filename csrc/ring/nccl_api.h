// The part of NCCL's binary interface that is used here, stable since NCCL 2.19. The library is the
// one that torch has loaded, whatever its version; nothing of NCCL is needed to build.
#pragma once

#include <cstddef>
#include <string>

#include "driver.h"

namespace lctx::ring::nccl {

using Comm = struct OpaqueComm*;

enum Result : int { kSuccess = 0, kInProgress = 7 };

constexpr int kInt8 = 0;  // of NCCL's data types
constexpr int kUndefined = -2147483647 - 1;

struct UniqueId {
  char bytes[128];
};

// The fields that a configuration had in 2.19; NCCL takes as many as `size` says.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21900;
  int blocking = 1;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
};

struct Api {
  Result (*ncclGetVersion)(int*);
  Result (*ncclGetUniqueId)(UniqueId*);
  Result (*ncclCommInitRankConfig)(Comm*, int world_size, UniqueId, int rank, Config*);
  Result (*ncclCommDestroy)(Comm);
  Result (*ncclCommAbort)(Comm);
  Result (*ncclCommGetAsyncError)(Comm, Result*);
  const char* (*ncclGetLastError)(Comm);
  const char* (*ncclGetErrorString)(Result);
  Result (*ncclMemAlloc)(void**, size_t);
  Result (*ncclMemFree)(void*);
  Result (*ncclCommRegister)(Comm, void*, size_t, void** handle);
  Result (*ncclCommDeregister)(Comm, void* handle);
  Result (*ncclGroupStart)();
  Result (*ncclGroupEnd)();
  Result (*ncclSend)(const void*, size_t, int type, int peer, Comm, CUstream);
  Result (*ncclRecv)(void*, size_t, int type, int peer, Comm, CUstream);
};

// Opens `library`, or the one that is loaded already where it is empty. Throws std::runtime_error.
const Api& api(const std::string& library = "");

// Throws std::runtime_error that says what was tried and what NCCL answered.
void check(Result result, const char* what, Comm comm = nullptr);

}  // namespace lctx::ring::nccl

// Calls a function of NCCL; throws where it fails.
#define LCTX_NCCL(name, ...) \
  ::lctx::ring::nccl::check(::lctx::ring::nccl::api().name(__VA_ARGS__), #name)
