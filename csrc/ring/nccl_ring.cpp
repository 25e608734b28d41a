#include "nccl_ring.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <utility>

namespace lctx::ring {
namespace nccl {
namespace {

Api open_api(const std::string& library) {
  // Opened by its name it is the one that is loaded, if there is one.
  const char* name = library.empty() ? "libnccl.so.2" : library.c_str();
  void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | (library.empty() ? RTLD_NOLOAD : 0));
  if (handle == nullptr) {
    const char* reason = dlerror();
    throw std::runtime_error(std::string("no NCCL: ") + (reason ? reason : "it is not loaded"));
  }
  Api found{};
#define LCTX_LOAD(function) \
  found.function = reinterpret_cast<decltype(found.function)>(symbol_of(handle, name, #function))
  LCTX_LOAD(ncclGetVersion);
  LCTX_LOAD(ncclGetUniqueId);
  LCTX_LOAD(ncclCommInitRankConfig);
  LCTX_LOAD(ncclCommDestroy);
  LCTX_LOAD(ncclCommAbort);
  LCTX_LOAD(ncclCommGetAsyncError);
  LCTX_LOAD(ncclGetLastError);
  LCTX_LOAD(ncclGetErrorString);
  LCTX_LOAD(ncclMemAlloc);
  LCTX_LOAD(ncclMemFree);
  LCTX_LOAD(ncclCommRegister);
  LCTX_LOAD(ncclCommDeregister);
  LCTX_LOAD(ncclGroupStart);
  LCTX_LOAD(ncclGroupEnd);
  LCTX_LOAD(ncclSend);
  LCTX_LOAD(ncclRecv);
#undef LCTX_LOAD
  return found;
}

}  // namespace

const Api& api(const std::string& library) {
  static const Api loaded = open_api(library);
  return loaded;
}

void check(Result result, const char* what, Comm comm) {
  if (result == kSuccess || result == kInProgress) return;
  const char* more = api().ncclGetLastError(comm);
  throw std::runtime_error(std::string(what) + ": " + api().ncclGetErrorString(result) +
                           (more != nullptr && *more != 0 ? std::string(" (") + more + ")" : ""));
}

}  // namespace nccl

namespace {

// Calls that NCCL starts together. Left open after an error a group would swallow whatever else its
// thread asks of NCCL.
class Group {
 public:
  Group() { LCTX_NCCL(ncclGroupStart); }
  ~Group() {
    if (open_) nccl::api().ncclGroupEnd();
  }
  void end() {
    open_ = false;
    LCTX_NCCL(ncclGroupEnd);
  }

 private:
  bool open_ = true;
};

}  // namespace

NcclRing::NcclRing(int rank, int world_size, const std::vector<std::string>& ids, int max_ctas)
    : Ring(rank, world_size) {
  for (int channel = 0; channel < kChannels; ++channel) {
    nccl::UniqueId id;
    std::memcpy(id.bytes, ids.at(channel).data(), sizeof id.bytes);
    nccl::Config config;
    config.cga_cluster_size = 0;  // clusters would wait for a whole group of multiprocessors
    config.max_ctas = max_ctas;
    LCTX_NCCL(ncclCommInitRankConfig, &comms_[channel], world_size, id, rank, &config);
  }
}

NcclRing::~NcclRing() { close(); }

std::vector<std::string> NcclRing::make_ids() {
  std::vector<std::string> ids;
  for (int channel = 0; channel < kChannels; ++channel) {
    nccl::UniqueId id;
    LCTX_NCCL(ncclGetUniqueId, &id);
    ids.emplace_back(id.bytes, sizeof id.bytes);
  }
  return ids;
}

bool NcclRing::allocate(int64_t bytes) {
  LCTX_NCCL(ncclMemAlloc, &memory_, static_cast<size_t>(bytes));
  for (int channel = 0; channel < kChannels; ++channel) {
    const auto result = nccl::api().ncclCommRegister(
        comms_[channel], memory_, static_cast<size_t>(bytes), &handles_[channel]);
    if (result != nccl::kSuccess || handles_[channel] == nullptr) {
      deregister();
      return false;
    }
  }
  return true;
}

void NcclRing::deregister() {
  if (!aborted_) take_back();
}

void NcclRing::take_back() {
  for (int channel = 0; channel < kChannels; ++channel) {
    if (handles_[channel] != nullptr) {
      nccl::api().ncclCommDeregister(comms_[channel], handles_[channel]);
    }
    handles_[channel] = nullptr;
  }
}

void NcclRing::free_memory() {
  deregister();
  if (memory_ != nullptr) LCTX_NCCL(ncclMemFree, std::exchange(memory_, nullptr));
}

void NcclRing::warm_up() {
  const int next = (rank_ + 1) % world_size_, previous = (rank_ + world_size_ - 1) % world_size_;
  for (int channel = 0; channel < kChannels; ++channel) {
    char* base = static_cast<char*>(memory_);
    Group group;
    LCTX_NCCL(ncclSend, base, 1, nccl::kInt8, next, comms_[channel], channels_[channel]);
    LCTX_NCCL(ncclRecv, base + 16, 1, nccl::kInt8, previous, comms_[channel], channels_[channel]);
    if (next != previous) {
      LCTX_NCCL(ncclSend, base, 1, nccl::kInt8, previous, comms_[channel], channels_[channel]);
      LCTX_NCCL(ncclRecv, base + 32, 1, nccl::kInt8, next, comms_[channel], channels_[channel]);
    }
    group.end();
    LCTX_CU(cuStreamSynchronize, channels_[channel]);
  }
}

void NcclRing::enqueue(Hop& hop, CUstream stream, CUevent) {
  if (aborted_) throw std::runtime_error("the communicator was given up");
  const nccl::Comm comm = comms_[hop.channel()];
  Group group;
  for (const Message& m : hop.sends) {
    LCTX_NCCL(ncclSend, reinterpret_cast<const void*>(m.data), static_cast<size_t>(m.bytes),
              nccl::kInt8, m.peer, comm, stream);
  }
  for (const Message& m : hop.recvs) {
    LCTX_NCCL(ncclRecv, reinterpret_cast<void*>(m.data), static_cast<size_t>(m.bytes), nccl::kInt8,
              m.peer, comm, stream);
  }
  group.end();
}

// NCCL frees a communicator's connections before the registrations that are left, which then use
// freed memory (2.28, 2.30), and to deregister asks the proxies of peers, who may never answer. In
// a group an abort only tells kernels, and calls that wait, to stop; what is deregistered then asks
// nobody, and the end of the group frees.
void NcclRing::release(const std::vector<Hop*>&) {
  if (aborted_) return;
  driver().cuStreamSynchronize_(rescue_);  // what fills the missing data comes first
  aborted_ = true;
  nccl::api().ncclGroupStart();
  for (nccl::Comm comm : comms_) nccl::api().ncclCommAbort(comm);
}

void NcclRing::leave_peers() {
  take_back();
  nccl::api().ncclGroupEnd();
}

std::string NcclRing::missing(const Hop& hop) {
  std::string text;
  for (const auto* messages : {&hop.sends, &hop.recvs}) {
    for (const Message& m : *messages) {
      text += (text.empty() ? "no exchange with rank " : ", ") + std::to_string(m.peer);
    }
  }
  return text;
}

std::string NcclRing::asynchronous_error() {
  for (nccl::Comm comm : comms_) {
    nccl::Result error = nccl::kSuccess;
    if (aborted_ || nccl::api().ncclCommGetAsyncError(comm, &error) != nccl::kSuccess) continue;
    if (error != nccl::kSuccess && error != nccl::kInProgress) {
      return std::string("NCCL: ") + nccl::api().ncclGetErrorString(error);
    }
  }
  return "";
}

}  // namespace lctx::ring
