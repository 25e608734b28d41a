// Hops by NCCL: one send and one receive of packed buffers in a group, a communicator for each
// channel, on streams of the highest priority.
//
// The memory that hops use comes from NCCL and is registered with both communicators on every rank,
// or on none: with one side registered a hop hangs. Not all blocks take part (max_ctas, no
// clusters): registered, each moves 40 GB/s each way, and takes a multiprocessor from the
// attention.
#pragma once

#include "nccl_api.h"
#include "ring.h"

namespace lctx::ring {

class NcclRing : public Ring {
 public:
  // ids: of the communicators, made by one rank. Returns when all ranks have come.
  NcclRing(int rank, int world_size, const std::vector<std::string>& ids, int max_ctas);
  ~NcclRing() override;

  static std::vector<std::string> make_ids();

  // New memory of that many bytes. Returns whether it is registered.
  bool allocate(int64_t bytes);
  // Takes the registration back, because another rank has none.
  void deregister();
  void free_memory() override;
  CUdeviceptr memory() const { return reinterpret_cast<CUdeviceptr>(memory_); }
  // A first hop to and from both neighbours, which makes the connections.
  void warm_up();

 protected:
  void enqueue(Hop& hop, CUstream stream, CUevent arrived) override;
  bool starts_first() const override { return true; }
  void release(const std::vector<Hop*>& pending) override;
  void leave_peers() override;
  std::string missing(const Hop& hop) override;
  std::string asynchronous_error() override;

 private:
  void take_back();

  nccl::Comm comms_[kChannels] = {};
  void* handles_[kChannels] = {};
  void* memory_ = nullptr;
  std::atomic<bool> aborted_{false};
};

}  // namespace lctx::ring
