#include "copy_ring.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace lctx::ring {
namespace {

constexpr size_t kWordStep = 128;                 // bytes from word to word: a cache line each
constexpr size_t kGranularity = size_t{2} << 20;  // a mapping of IPC covers whole allocations
constexpr uint32_t kRelease = 1u << 30;           // ahead of any count that is waited for

size_t rounded(size_t bytes) { return (bytes + kGranularity - 1) / kGranularity * kGranularity; }

Handle handle_of(CUdeviceptr pointer) {
  CUipcMemHandle handle;
  LCTX_CU(cuIpcGetMemHandle, &handle, pointer);
  return Handle(handle.reserved, sizeof handle.reserved);
}

CUdeviceptr open(const Handle& text) {
  CUipcMemHandle handle;
  if (text.size() != sizeof handle.reserved) throw std::runtime_error("not a handle of memory");
  std::memcpy(handle.reserved, text.data(), sizeof handle.reserved);
  CUdeviceptr pointer = 0;
  LCTX_CU(cuIpcOpenMemHandle, &pointer, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  return pointer;
}

void open_all(const std::vector<Handle>& handles, int rank, CUdeviceptr own,
              std::vector<CUdeviceptr>& opened) {
  for (size_t peer = 0; peer < handles.size(); ++peer) {
    opened.push_back(static_cast<int>(peer) == rank ? own : open(handles[peer]));
  }
}

void close_all(std::vector<CUdeviceptr>& opened, int rank) {
  for (size_t peer = 0; peer < opened.size(); ++peer) {
    if (static_cast<int>(peer) != rank) driver().cuIpcCloseMemHandle_(opened[peer]);
  }
  opened.clear();
}

}  // namespace

CopyRing::CopyRing(int rank, int world_size) : Ring(rank, world_size) {
  // Of the priority of keys: in one hardware queue with them it only waits in the channel's order.
  LCTX_CU(cuStreamCreateWithPriority, &receiver_, CU_STREAM_NON_BLOCKING, kKeysPriority);
  const size_t bytes = rounded(word(kTest, kChannels, 0) + kWordStep);
  LCTX_CU(cuMemAlloc, &words_, bytes);
  LCTX_CU(cuMemsetD8Async, words_, 0, bytes, rescue_);
  LCTX_CU(cuStreamSynchronize, rescue_);
  for (int channel = 0; channel < kChannels; ++channel) {
    sent_[channel].resize(world_size);
    received_[channel].resize(world_size);
  }
}

CopyRing::~CopyRing() {
  close();
  if (driver().cuStreamQuery_(receiver_) == CUDA_SUCCESS) driver().cuStreamDestroy_(receiver_);
}

// Not sums: a kernel may write to a slot when its hop was waited for.
bool CopyRing::arrives_first(const Hop& hop) const {
  const auto bytes = [](const std::vector<Message>& messages) {
    int64_t total = 0;
    for (const Message& m : messages) total += m.bytes;
    return total;
  };
  return hop.channel() == 0 && !hop.recvs.empty() && bytes(hop.recvs) < bytes(hop.sends);
}

size_t CopyRing::word(Word kind, int channel, int peer) const {
  return ((static_cast<size_t>(kind) * kChannels + channel) * world_size_ + peer) * kWordStep;
}

Handle CopyRing::words_handle() const { return handle_of(words_); }

void CopyRing::connect_words(const std::vector<Handle>& handles) {
  open_all(handles, rank_, words_, peer_words_);
}

Handle CopyRing::allocate(int64_t bytes) {
  LCTX_CU(cuMemAlloc, &memory_, rounded(static_cast<size_t>(bytes)));
  return handle_of(memory_);
}

void CopyRing::connect(const std::vector<Handle>& handles) {
  open_all(handles, rank_, memory_, peer_memory_);
}

void CopyRing::disconnect() { close_all(peer_memory_, rank_); }

void CopyRing::leave_peers() {
  driver().cuStreamSynchronize_(rescue_);
  close_all(peer_memory_, rank_);
  close_all(peer_words_, rank_);
}

void CopyRing::free_memory() {
  if (memory_ != 0) LCTX_CU(cuMemFree, std::exchange(memory_, 0));
  if (peer_words_.empty() && words_ != 0) LCTX_CU(cuMemFree, std::exchange(words_, 0));
}

void CopyRing::tell(CUstream stream, Word kind, int channel, int peer, uint32_t count) {
  const CUdeviceptr out = words_ + word(static_cast<Word>(kind + kFreeOut), channel, peer);
  LCTX_CU(cuStreamWriteValue32, stream, out, count, CU_STREAM_WRITE_VALUE_DEFAULT);
  LCTX_CU(cuMemcpyDtoDAsync, peer_words_[peer] + word(kind, channel, rank_), out, sizeof count,
          stream);
}

void CopyRing::copy(const Message& m, CUstream stream) {
  CUdeviceptr to = peer_memory_[m.peer] + m.place;
  if (m.pieces.empty()) {
    LCTX_CU(cuMemcpyDtoDAsync, to, m.data, static_cast<size_t>(m.bytes), stream);
  }
  for (const auto& [data, bytes] : m.pieces) {
    if (bytes > 0) LCTX_CU(cuMemcpyDtoDAsync, to, data, static_cast<size_t>(bytes), stream);
    to += static_cast<CUdeviceptr>(bytes);
  }
}

void CopyRing::enqueue(Hop& hop, CUstream stream, CUevent arrived) {
  const int channel = hop.channel();
  for (const Message& m : hop.sends) hop.send_counts.push_back(++sent_[channel][m.peer]);
  for (const Message& m : hop.recvs) hop.recv_counts.push_back(++received_[channel][m.peer]);
  const CUstream receiver = arrived != nullptr ? receiver_ : stream;
  direct_ ? enqueue_direct(hop, stream, receiver) : enqueue_by_copies(hop, stream, receiver);
  if (arrived == nullptr) return;
  LCTX_CU(cuEventRecord, arrived, receiver);
  LCTX_CU(cuStreamWaitEvent, stream, arrived, 0);
}

void CopyRing::enqueue_by_copies(const Hop& hop, CUstream stream, CUstream receiver) {
  const int channel = hop.channel();
  for (size_t i = 0; i < hop.recvs.size(); ++i) {
    tell(stream, kFreeIn, channel, hop.recvs[i].peer, hop.recv_counts[i]);
  }
  for (size_t i = 0; i < hop.sends.size(); ++i) {
    const int peer = hop.sends[i].peer;
    LCTX_CU(cuStreamWaitValue32, stream, words_ + word(kFreeIn, channel, peer), hop.send_counts[i],
            CU_STREAM_WAIT_VALUE_GEQ);
    copy(hop.sends[i], stream);
    tell(stream, kDataIn, channel, peer, hop.send_counts[i]);
  }
  for (size_t i = 0; i < hop.recvs.size(); ++i) {
    LCTX_CU(cuStreamWaitValue32, receiver, words_ + word(kDataIn, channel, hop.recvs[i].peer),
            hop.recv_counts[i], CU_STREAM_WAIT_VALUE_GEQ);
  }
}

void CopyRing::enqueue_direct(const Hop& hop, CUstream stream, CUstream receiver) {
  const int channel = hop.channel();
  std::vector<CUstreamBatchMemOpParams> operations;
  const auto write = [&](Word kind, int peer, uint32_t count) {
    CUstreamBatchMemOpParams one{};
    one.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
    one.writeValue.address = peer_words_[peer] + word(kind, channel, rank_);
    one.writeValue.value = count;
    operations.push_back(one);
  };
  const auto wait = [&](Word kind, int peer, uint32_t count) {
    CUstreamBatchMemOpParams one{};
    one.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
    one.waitValue.address = words_ + word(kind, channel, peer);
    one.waitValue.value = count;
    one.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
    operations.push_back(one);
  };
  const auto run = [&](CUstream in) {
    if (operations.empty()) return;
    LCTX_CU(cuStreamBatchMemOp, in, static_cast<unsigned>(operations.size()), operations.data(), 0);
    operations.clear();
  };
  for (size_t i = 0; i < hop.recvs.size(); ++i)
    write(kFreeIn, hop.recvs[i].peer, hop.recv_counts[i]);
  for (size_t i = 0; i < hop.sends.size(); ++i)
    wait(kFreeIn, hop.sends[i].peer, hop.send_counts[i]);
  run(stream);
  for (const Message& m : hop.sends) copy(m, stream);
  for (size_t i = 0; i < hop.sends.size(); ++i)
    write(kDataIn, hop.sends[i].peer, hop.send_counts[i]);
  if (receiver != stream) run(stream);
  for (size_t i = 0; i < hop.recvs.size(); ++i)
    wait(kDataIn, hop.recvs[i].peer, hop.recv_counts[i]);
  run(receiver);
}

void CopyRing::try_direct() {
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_) continue;
    LCTX_CU(cuStreamWriteValue32, rescue_, peer_words_[peer] + word(kTest, 0, rank_),
            static_cast<uint32_t>(rank_ + 1), CU_STREAM_WRITE_VALUE_DEFAULT);
  }
  LCTX_CU(cuStreamSynchronize, rescue_);
}

bool CopyRing::check_direct() {
  for (int peer = 0; peer < world_size_; ++peer) {
    const auto wanted = static_cast<uint32_t>(peer + 1);
    if (peer != rank_ && read(words_ + word(kTest, 0, peer)) != wanted) return false;
  }
  return true;
}

uint32_t CopyRing::read(CUdeviceptr word) {
  uint32_t found = 0;
  LCTX_CU(cuMemcpyDtoHAsync, &found, word, sizeof found, rescue_);
  LCTX_CU(cuStreamSynchronize, rescue_);
  return found;
}

void CopyRing::tell_peers() {
  for (int peer = 0; peer < static_cast<int>(peer_words_.size()); ++peer) {
    try {
      if (peer != rank_) tell(rescue_, kGaveUpIn, 0, peer, 1);
    } catch (const std::runtime_error&) {  // it does not hear; its own deadlines remain
    }
  }
}

void CopyRing::release(const std::vector<Hop*>& pending) {
  for (const Hop* hop : pending) {
    const int channel = hop->channel();
    const auto let_go = [&](Word kind, const Message& m, uint32_t count) {
      driver().cuStreamWriteValue32_(rescue_, words_ + word(kind, channel, m.peer),
                                     count + kRelease, CU_STREAM_WRITE_VALUE_DEFAULT);
    };
    for (size_t i = 0; i < hop->send_counts.size(); ++i) {
      let_go(kFreeIn, hop->sends[i], hop->send_counts[i]);
    }
    for (size_t i = 0; i < hop->recv_counts.size(); ++i) {
      let_go(kDataIn, hop->recvs[i], hop->recv_counts[i]);
    }
  }
}

std::string CopyRing::asynchronous_error() {
  std::vector<uint32_t> words(world_size_ * kWordStep / sizeof(uint32_t));
  const CUdeviceptr first = words_ + word(kGaveUpIn, 0, 0);
  try {
    LCTX_CU(cuMemcpyDtoHAsync, words.data(), first, words.size() * sizeof(uint32_t), rescue_);
    LCTX_CU(cuStreamSynchronize, rescue_);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  for (int peer = 0; peer < world_size_; ++peer) {
    if (words[peer * kWordStep / sizeof(uint32_t)] != 0) {
      return "rank " + std::to_string(peer) + " has given up";
    }
  }
  return "";
}

std::string CopyRing::missing(const Hop& hop) {
  const auto behind = [&](Word kind, int peer, uint32_t wanted) {
    return static_cast<int32_t>(read(words_ + word(kind, hop.channel(), peer)) - wanted) < 0;
  };
  std::string text;
  for (size_t i = 0; i < hop.send_counts.size(); ++i) {
    const int peer = hop.sends[i].peer;
    if (behind(kFreeIn, peer, hop.send_counts[i])) {
      text += "rank " + std::to_string(peer) + " has no place for it yet; ";
    }
  }
  for (size_t i = 0; i < hop.recv_counts.size(); ++i) {
    const int peer = hop.recvs[i].peer;
    if (behind(kDataIn, peer, hop.recv_counts[i])) {
      text += "rank " + std::to_string(peer) + " has sent nothing; ";
    }
  }
  return text.empty() ? "it takes longer than that" : text.substr(0, text.size() - 2);
}

}  // namespace lctx::ring
