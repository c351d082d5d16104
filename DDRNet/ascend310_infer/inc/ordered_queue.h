#pragma once

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "error.h"

// Makes the items 0, 1, …, count - 1 in several threads, a bounded number ahead of the one who takes them in this order.
// So memory does not grow with the count, and results do not depend on the number of threads. Without threads, an item is
// made when it is taken.
template <class Item>
class OrderedQueue {
 public:
  OrderedQueue(size_t count, size_t capacity, size_t threads, std::function<Item(size_t)> make)
      : count_(count), make_(std::move(make)), slots_(capacity) {
    try {
      for (size_t k = 0; k < threads; ++k) threads_.emplace_back([this] { Work(); });
    } catch (const std::system_error&) {
      Stop();
      throw Error("cannot start " + std::to_string(threads) + " threads; set --num_threads lower");
    }
  }

  OrderedQueue(const OrderedQueue&) = delete;
  OrderedQueue& operator=(const OrderedQueue&) = delete;

  ~OrderedQueue() { Stop(); }

  // The next item, to be called at most `count` times. Throws what making it has thrown.
  Item Take() {
    if (threads_.empty()) return make_(taken_++);
    std::unique_lock lock(mutex_);
    Slot& slot = slots_[taken_ % slots_.size()];
    made_.wait(lock, [&] { return slot.made; });
    slot.made = false;
    ++taken_;
    Item item = std::move(slot.item);
    const std::exception_ptr failure = std::exchange(slot.failure, nullptr);
    lock.unlock();
    room_.notify_one();
    if (failure) std::rethrow_exception(failure);
    return item;
  }

 private:
  struct Slot {
    bool made = false;
    Item item;
    std::exception_ptr failure;
  };

  void Work() {
    std::unique_lock lock(mutex_);
    while (true) {
      room_.wait(lock, [&] { return stopped_ || next_ == count_ || next_ < taken_ + slots_.size(); });
      if (stopped_ || next_ == count_) return;
      const size_t number = next_++;
      lock.unlock();
      Item item;
      std::exception_ptr failure;
      try {
        item = make_(number);
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      slots_[number % slots_.size()] = {true, std::move(item), failure};
      made_.notify_one();
    }
  }

  void Stop() {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    room_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const size_t count_;
  const std::function<Item(size_t)> make_;
  std::mutex mutex_;
  std::condition_variable made_, room_;
  std::vector<Slot> slots_;
  size_t next_ = 0, taken_ = 0;
  bool stopped_ = false;
  std::vector<std::thread> threads_;
};
