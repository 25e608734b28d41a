#include "ring.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace lctx::ring {
namespace {

constexpr size_t kLogLength = 4096;
constexpr auto kInterval = std::chrono::milliseconds(2);
// With nothing under way the watchdog looks on for a while before it sleeps: to wake it would take
// the next call's first hop longer than all else of it.
constexpr int kAwake = 500;                          // intervals
constexpr auto kPatience = std::chrono::seconds(2);  // with a hop that is being posted
// Of sums of gradients, and of the watchdog (kKeysPriority).
constexpr int kSumsPriority = -4, kRescuePriority = -3;

double steady_seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double seconds_now() {
  using namespace std::chrono;
  return duration<double>(system_clock::now().time_since_epoch()).count();
}

Ring::Ring(int rank, int world_size) : rank_(rank), world_size_(world_size) {
  LCTX_CU(cuCtxGetCurrent, &context_);
  if (context_ == nullptr) throw std::runtime_error("no CUDA context is current");
  LCTX_CU(cuStreamCreateWithPriority, &channels_[0], CU_STREAM_NON_BLOCKING, kKeysPriority);
  LCTX_CU(cuStreamCreateWithPriority, &channels_[1], CU_STREAM_NON_BLOCKING, kSumsPriority);
  LCTX_CU(cuStreamCreateWithPriority, &rescue_, CU_STREAM_NON_BLOCKING, kRescuePriority);
  watchdog_ = std::thread([this] { watch(); });
}

CUevent Ring::take_event() {
  if (free_events_.empty()) {
    CUevent event = nullptr;
    LCTX_CU(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
    return event;
  }
  CUevent event = free_events_.back();
  free_events_.pop_back();
  return event;
}

void Ring::throw_if_failed() const {
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

CUevent Ring::arrival(int64_t number) const {
  for (const auto& pending : pending_) {  // the latest are last, and asked for most
    for (auto one = pending.rbegin(); one != pending.rend() && one->number >= number; ++one) {
      if (one->number == number) return one->arrived != nullptr ? one->arrived : one->done;
    }
  }
  return nullptr;
}

int64_t Ring::post(CUstream stream, Hop posted) {
  const std::lock_guard<std::timed_mutex> order(posting_);
  auto hop = std::make_shared<Hop>(std::move(posted));
  hop->posted = seconds_now();
  const int channel = hop->channel();
  Pending pending{};
  pending.hop = hop;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    throw_if_failed();
    if (closing_) throw std::runtime_error("the transport is closed");
    pending.number = hop->number = next_number_++;
    pending.ready = take_event();
    pending.done = take_event();
    if (arrives_first(*hop)) pending.arrived = take_event();
  }
  const double begin = steady_seconds();
  // Without the lock: a full queue blocks here until the watchdog has let the stream go on.
  try {
    LCTX_CU(cuEventRecord, pending.ready, stream);
    LCTX_CU(cuStreamWaitEvent, channels_[channel], pending.ready, 0);
    if (starts_first()) LCTX_CU(cuEventRecord, pending.ready, channels_[channel]);
    enqueue(*hop, channels_[channel], pending.arrived);
    if (starts_first()) LCTX_CU(cuStreamWaitEvent, stream, pending.ready, 0);
    LCTX_CU(cuEventRecord, pending.done, channels_[channel]);
  } catch (const std::exception& error) {  // half a hop: the peers' counts are not ours any more
    abort(error.what());
    throw;
  }
  const double seconds = steady_seconds() - begin;
  const std::lock_guard<std::mutex> lock(mutex_);
  library_seconds_ += seconds;
  pending_[channel].push_back(pending);
  log_.push_back(hop);
  if (log_.size() > kLogLength) log_.pop_front();
  if (asleep_) changed_.notify_all();
  return hop->number;
}

void Ring::wait(int64_t number, CUstream stream) {
  CUevent there = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    throw_if_failed();
    there = arrival(number);
    if (there == nullptr) return;  // it is done
  }
  const double begin = steady_seconds();
  LCTX_CU(cuStreamWaitEvent, stream, there, 0);
  const double seconds = steady_seconds() - begin;
  const std::lock_guard<std::mutex> lock(mutex_);
  library_seconds_ += seconds;
}

void Ring::settle(CUstream stream) {
  std::vector<CUevent> last;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    throw_if_failed();
    for (const auto& pending : pending_) {  // a channel's hops end in order
      const auto early = [](const Pending& one) { return one.arrived != nullptr; };
      const bool any = std::any_of(pending.begin(), pending.end(), early);
      if (any) last.push_back(pending.back().done);
    }
  }
  for (CUevent event : last) LCTX_CU(cuStreamWaitEvent, stream, event, 0);
}

bool Ring::done(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  CUevent event = arrival(number);
  return event == nullptr || driver().cuEventQuery_(event) == CUDA_SUCCESS;
}

void Ring::synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return !failure_.empty() || idle(); });
  throw_if_failed();
}

void Ring::abort(const std::string& reason) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!watching_) {
    if (failure_.empty()) failure_ = reason;
    return;
  }
  abort_reason_ = reason;
  changed_.notify_all();
  changed_.wait(lock, [this] { return !failure_.empty() || !watching_; });
}

bool Ring::let_go(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (failure_.empty() || !watching_ || peers_ == Peers::kGone) return peers_ == Peers::kGone;
  peers_ = Peers::kAsked;
  changed_.notify_all();
  changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                    [this] { return peers_ != Peers::kAsked || !watching_; });
  return peers_ == Peers::kGone;
}

void Ring::close(double patience) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    patience_ = patience;
    changed_.notify_all();
  }
  if (!watchdog_.joinable()) return;
  watchdog_.join();
  if (!idle()) return;  // a kernel of the caller hangs, and with it a stream
  for (CUevent event : free_events_) driver().cuEventDestroy_(event);
  free_events_.clear();
  for (CUstream stream : {channels_[0], channels_[1], rescue_}) driver().cuStreamDestroy_(stream);
}

double Ring::library_seconds() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return library_seconds_;
}

std::vector<Hop> Ring::log() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Hop> copies;
  for (const auto& hop : log_) copies.push_back(*hop);
  return copies;
}

bool Ring::failed() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !failure_.empty();
}

Hop Ring::failure() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return failed_hop_;
}

void Ring::watch() {
  driver().cuCtxSetCurrent_(context_);
  std::unique_lock<std::mutex> lock(mutex_);
  const auto asked = [this] {
    return closing_ || !abort_reason_.empty() || !idle() || peers_ == Peers::kAsked;
  };
  double closing_since = 0;
  int idle_since = 0;  // intervals
  while (true) {
    if (!abort_reason_.empty() && failure_.empty()) fail_first(abort_reason_);
    abort_reason_.clear();
    if (peers_ == Peers::kAsked && idle()) try_to_leave(lock);
    if (closing_ && idle()) break;
    if (idle()) {
      if (++idle_since < kAwake) {
        changed_.wait_for(lock, kInterval);
      } else {
        asleep_ = true;
        changed_.wait(lock, asked);
        asleep_ = false;
      }
      continue;
    }
    idle_since = 0;
    std::string error;
    size_t done[kChannels];
    for (int channel = 0; channel < kChannels; ++channel) done[channel] = ended(channel, error);
    if (failure_.empty() && error.empty()) {
      lock.unlock();
      error = asynchronous_error();
      lock.lock();
    }
    for (int channel = 0; channel < kChannels; ++channel) look_after(channel, done[channel], error);
    const double now = steady_seconds();
    if (closing_ && closing_since == 0) closing_since = now;
    if (closing_ && failure_.empty() && !idle() && now - closing_since > patience_) {
      fail_first("closed");
    }
    if (closing_ && !failure_.empty() && now - std::max(closing_since, failed_since_) > 2) {
      break;  // a kernel of the caller hangs
    }
    if (idle()) changed_.notify_all();
    changed_.wait_for(lock, kInterval);
  }
  watching_ = false;
  changed_.notify_all();
}

void Ring::try_to_leave(std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  std::unique_lock<std::timed_mutex> order(posting_, kPatience);
  lock.lock();
  if (!order) {
    peers_ = Peers::kRefused;
  } else if (idle()) {  // else what was being posted has to pass first
    lock.unlock();
    leave_peers();
    lock.lock();
    peers_ = Peers::kGone;
  }
  changed_.notify_all();
}

void Ring::fail_first(const std::string& what) {
  for (const auto& pending : pending_) {
    if (!pending.empty()) return fail(*pending.front().hop, what);
  }
  Hop none;
  fail(none, what);
}

size_t Ring::ended(int channel, std::string& error) const {
  size_t count = 0;
  for (const Pending& one : pending_[channel]) {
    const CUresult result = driver().cuEventQuery_(one.done);
    if (result == CUDA_ERROR_NOT_READY) break;
    if (result != CUDA_SUCCESS) error = text_of(result, "CUDA");
    ++count;
  }
  return count;
}

void Ring::look_after(int channel, size_t ended, const std::string& error) {
  auto& pending = pending_[channel];
  if (!error.empty() && failure_.empty() && !pending.empty()) fail(*pending.front().hop, error);
  for (; ended > 0; --ended) {
    Pending& first = pending.front();
    if (failure_.empty()) first.hop->done = seconds_now();
    if (first.hop->ready == 0) first.hop->ready = seconds_now();
    free_events_.push_back(first.ready);
    free_events_.push_back(first.done);
    if (first.arrived != nullptr) free_events_.push_back(first.arrived);
    pending.pop_front();
    front_since_[channel] = 0;
  }
  if (pending.empty()) return;
  if (!failure_.empty()) {
    std::vector<Hop*> hops;
    for (Pending& one : pending) hops.push_back(one.hop.get());
    release(hops);
    return;
  }
  Pending& first = pending.front();
  if (front_since_[channel] == 0) {
    if (driver().cuEventQuery_(first.ready) == CUDA_ERROR_NOT_READY) return;
    front_since_[channel] = steady_seconds();
    first.hop->ready = seconds_now();
  }
  if (steady_seconds() - front_since_[channel] > first.hop->timeout) {
    fail(*first.hop, missing(*first.hop));
  }
}

void Ring::fail(Hop& hop, const std::string& what) {
  hop.error = what.empty() ? "given up" : what;
  failed_hop_ = hop;
  failure_ = hop.error;
  failed_since_ = steady_seconds();
  tell_peers();
  std::vector<Hop*> hops;
  for (auto& pending : pending_) {
    for (Pending& one : pending) {
      hops.push_back(one.hop.get());
      one.hop->error = hop.error;
      for (const Message& m : one.hop->recvs) {  // 0xff...: NaN in every format
        driver().cuMemsetD8Async_(m.data, 0xff, static_cast<size_t>(m.bytes), rescue_);
      }
    }
  }
  release(hops);
  changed_.notify_all();
}

}  // namespace lctx::ring
