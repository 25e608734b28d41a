// What both communicators share: hops on streams of their own, their log, and a watchdog.
//
// A hop is posted on the caller's stream and runs on that of its channel; nothing waits on the
// host. A thread looks after the hops that are under way. The deadline of a hop runs from when this
// rank is ready for it, which the GPU says, so that work queued before it does not count. Past it
// the watchdog sets the failure, tells the peers, fills what was still to arrive with NaN, and lets
// the streams go on: nobody hangs, and every later call throws.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "driver.h"

namespace lctx::ring {

// Keys and values, and gradients, travel apart: neither waits for the other.
constexpr int kChannels = 2;

// Streams of one priority may share a hardware queue, where one that waits stops the others: each
// of ours has a priority of its own, and the watchdog's another than those that it rescues.
constexpr int kKeysPriority = -5;

struct Message {
  int peer;
  CUdeviceptr data;
  int64_t bytes;
  int64_t place;  // offset in the peer's memory; of a receive: in one's own
  // Addresses and bytes that it is made of, if not of the bytes at `data`; the copy engine's only.
  std::vector<std::pair<CUdeviceptr, int64_t>> pieces;
};

// A hop as the log keeps it. Times are seconds since 1970, 0 before they are known.
struct Hop {
  int64_t number = 0, call = 0;
  int phase = 0, step = 0, part = 0;
  std::vector<Message> sends, recvs;
  double timeout = 0, posted = 0, ready = 0, done = 0;
  std::string error;
  // How many messages of its channel each peer has taken and sent when this hop is done.
  std::vector<uint32_t> send_counts, recv_counts;

  int channel() const { return phase == 2 ? 1 : 0; }
};

class Ring {
 public:
  Ring(int rank, int world_size);
  virtual ~Ring() { close(); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Starts a hop after what `stream` has been given so far; returns its number. Throws
  // std::runtime_error after a failure, and an error of the driver, which is one.
  int64_t post(CUstream stream, Hop hop);
  // Lets `stream` wait until what the hop receives is there, and until everything that earlier hops
  // of its channel send has left. Throws std::runtime_error after a failure.
  void wait(int64_t number, CUstream stream);
  // Lets `stream` wait until everything that hops send has left, where wait() did not.
  void settle(CUstream stream);
  bool done(int64_t number);
  // Waits on the host until no hop is under way. Throws std::runtime_error after a failure, this
  // rank's or one that a peer had before its part of these hops.
  void synchronize();
  // Gives up every hop under way.
  void abort(const std::string& reason);
  // After a failure, lets go of the peers: of what is mapped of theirs, and of communicators, so
  // that nothing of this rank can reach them any more. Returns whether that is so; false where
  // nothing failed, where it takes more than so many seconds (it goes on), where a hop is still
  // being posted (ask again), and after close(). It may wait for all that the GPU does, and the
  // driver serves no other thread meanwhile, not even a watchdog: to be called when nothing is
  // under way, on all ranks before either goes on.
  bool let_go(double seconds);
  // Frees the memory of hops. After a failure only where this rank and all of its peers have let
  // go: a late peer would write to it.
  virtual void free_memory() = 0;
  // Ends the watchdog; a hop still under way after so many seconds is given up. Every subclass
  // calls it in its destructor, where its release() still is.
  void close(double patience = 1);

  // What post() and wait() have spent in calls of the driver and of NCCL.
  double library_seconds();
  std::vector<Hop> log();
  bool failed();
  // The hop that failed first, and how; its error is empty before a failure.
  Hop failure();

 protected:
  // Puts the exchange into `stream`, of the hop's channel. Records `arrived`, if it is one, when
  // all receives are there.
  virtual void enqueue(Hop& hop, CUstream stream, CUevent arrived) = 0;
  // Whether what a hop receives is there long before what it sends has left.
  virtual bool arrives_first(const Hop&) const { return false; }
  // Whether what the caller's stream is given later waits until the exchange may begin: a kernel
  // that takes all multiprocessors would else begin before it, and keep it from starting.
  virtual bool starts_first() const { return false; }
  // Tells the peers that this rank gives up, in the rescue stream, ahead of release().
  virtual void tell_peers() {}
  // Lets the channels' streams go on without their peers; called again while they do not. Always on
  // the watchdog's thread, as all that follows here.
  virtual void release(const std::vector<Hop*>& pending) = 0;
  // What let_go() says; called once, with no hop under way or being posted.
  virtual void leave_peers() = 0;
  // Which messages of a hop have not come, as text.
  virtual std::string missing(const Hop& hop) = 0;
  // An error of the transport itself or of a peer, or "". Asked without the lock, after hops were
  // found done and before they count as done.
  virtual std::string asynchronous_error() { return ""; }

  const int rank_, world_size_;
  CUstream channels_[kChannels] = {};
  CUstream rescue_ = nullptr;  // of the watchdog

 private:
  enum class Peers { kHeld, kAsked, kRefused, kGone };  // what let_go() has come to

  struct Pending {
    std::shared_ptr<Hop> hop;
    int64_t number;
    CUevent ready, done;
    CUevent arrived;  // null: when it is done
  };

  CUevent take_event();
  CUevent arrival(int64_t number) const;  // null where the hop is done
  void watch();
  bool idle() const { return pending_[0].empty() && pending_[1].empty(); }
  void try_to_leave(std::unique_lock<std::mutex>& lock);  // of mutex_
  void fail_first(const std::string& what);
  // How many hops, from the first, the GPU has ended; sets `error` where it failed.
  size_t ended(int channel, std::string& error) const;
  // The watchdog's round, with as many ended hops, and what went wrong, or "".
  void look_after(int channel, size_t ended, const std::string& error);
  void fail(Hop& hop, const std::string& what);
  void throw_if_failed() const;

  CUcontext context_ = nullptr;
  std::timed_mutex posting_;  // keeps hops of several threads in one order
  std::mutex mutex_;          // of everything below; held over a wait for the GPU only to fail
  std::condition_variable changed_;
  std::deque<Pending> pending_[kChannels];
  std::vector<CUevent> free_events_;
  std::deque<std::shared_ptr<Hop>> log_;
  double front_since_[kChannels] = {};      // when the first pending hop was found ready, steady
  double failed_since_ = 0, patience_ = 0;  // steady; of close()
  int64_t next_number_ = 1;
  double library_seconds_ = 0;
  Hop failed_hop_;
  std::string failure_, abort_reason_;
  Peers peers_ = Peers::kHeld;
  bool closing_ = false, watching_ = true, asleep_ = false;
  std::thread watchdog_;
};

double seconds_now();  // since 1970

}  // namespace lctx::ring
