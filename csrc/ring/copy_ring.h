// Hops by the copy engine, between processes of one host: no multiprocessor takes part, so no
// attention kernel can keep a hop from starting.
//
// Every rank owns memory for what it receives, and words that its peers count in; both are mapped
// by all peers (CUDA IPC). A hop, on its channel's stream:
//   tell each sender that its place here is free          (a word there)
//   for each receiver: wait until its place is free, copy, tell it that the data is there
//   wait for the data
// Where more keys leave than come, a stream of its own waits for the data, so that kernels need not
// wait for what leaves; the channel's waits for it behind its copies. Words count messages, so they
// are never reset. A rank that gives up raises its own words past all counts, so that its streams
// go on, and sends what it has; before, it sets a word at every peer, by which they know that what
// has come is void. The stream writes a peer's word itself where that works between all ranks (not
// every driver lets it, for memory of another process), else a copy of 4 bytes brings it, behind
// the data in the same stream.
#pragma once

#include "ring.h"

namespace lctx::ring {

using Handle = std::string;  // the bytes of a CUipcMemHandle

class CopyRing : public Ring {
 public:
  CopyRing(int rank, int world_size);
  ~CopyRing() override;

  Handle words_handle() const;
  // Maps the words of all ranks.
  void connect_words(const std::vector<Handle>& handles);
  // Whether streams write the words of peers: `try_direct` writes to all, then, when all ranks
  // have, `check_direct` says whether all writes have come, and `use_direct` makes hops use it.
  void try_direct();
  bool check_direct();
  void use_direct() { direct_ = true; }
  // New memory of that many bytes for what this rank receives and sends; its handle.
  Handle allocate(int64_t bytes);
  // Maps the memory of all ranks.
  void connect(const std::vector<Handle>& handles);
  // Takes the mappings back, before any rank frees its memory.
  void disconnect();
  // After a failure its words, too.
  void free_memory() override;
  CUdeviceptr memory() const { return memory_; }

 protected:
  void enqueue(Hop& hop, CUstream stream, CUevent arrived) override;
  bool arrives_first(const Hop& hop) const override;
  void tell_peers() override;
  void release(const std::vector<Hop*>& pending) override;
  void leave_peers() override;
  std::string missing(const Hop& hop) override;
  std::string asynchronous_error() override;

 private:
  enum Word { kFreeIn, kDataIn, kGaveUpIn, kFreeOut, kDataOut, kGaveUpOut, kTest };

  size_t word(Word kind, int channel, int peer) const;
  void tell(CUstream stream, Word kind, int channel, int peer, uint32_t count);
  void copy(const Message& m, CUstream stream);
  void enqueue_by_copies(const Hop& hop, CUstream stream, CUstream receiver);
  void enqueue_direct(const Hop& hop, CUstream stream, CUstream receiver);
  uint32_t read(CUdeviceptr word);

  bool direct_ = false;
  CUstream receiver_ = nullptr;
  CUdeviceptr words_ = 0, memory_ = 0;
  std::vector<CUdeviceptr> peer_words_, peer_memory_;
  std::vector<uint32_t> sent_[kChannels], received_[kChannels];
};

}  // namespace lctx::ring
