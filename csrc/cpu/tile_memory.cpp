#include "cpu/tile_memory.h"

#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pst {

constexpr int64_t kHuge = int64_t(2) << 20;   // bytes of a huge page
constexpr int64_t kSmallest = int64_t(1) << 20;  // smaller tensors stay with torch

namespace {

struct Block {
  void* data;
  int64_t bytes;
};

class Memory {
 public:
  void* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto i = free_.begin(); i != free_.end(); ++i)
        if (i->bytes == bytes) {
          void* data = i->data;
          free_.erase(i);
          kept_ -= bytes;
          return data;
        }
    }
    void* data = ::operator new(size_t(bytes), std::align_val_t(kHuge));
#ifdef __linux__
    madvise(data, size_t(bytes), MADV_HUGEPAGE);  // advice: nothing depends on it
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[data] = bytes;
    return data;
  }

  void give(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_front({data, sizes_.at(data)});
    kept_ += free_.front().bytes;
    shrink();
  }

  void limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink();
  }

 private:
  // the least lately used go first
  void shrink() {
    while (kept_ > limit_) {
      kept_ -= free_.back().bytes;
      sizes_.erase(free_.back().data);
      ::operator delete(free_.back().data, std::align_val_t(kHuge));
      free_.pop_back();
    }
  }

  std::mutex mutex_;
  std::list<Block> free_;  // latest first
  std::unordered_map<void*, int64_t> sizes_;
  int64_t kept_ = 0, limit_ = int64_t(1) << 30;
};

// never destroyed: tensors may outlive static objects
Memory& memory() {
  static Memory* const one = new Memory;
  return *one;
}

void give_back(void* data) { memory().give(data); }

}  // namespace

Tensor new_tiles(const Tensor& like, std::vector<int64_t> size) {
  int64_t floats = 1;
  for (int64_t n : size) floats *= n;
  const int64_t bytes = (floats * int64_t(sizeof(float)) + kHuge - 1) / kHuge * kHuge;
  if (floats * int64_t(sizeof(float)) < kSmallest) return new_floats(like, size);
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t d = size.size() - 1; d-- > 0;) stride[d] = stride[d + 1] * size[d + 1];
  return torch::stable::from_blob(memory().take(bytes), size, stride, like.device(), ScalarType::Float, give_back);
}

void keep_tile_memory(int64_t bytes) { memory().limit(bytes); }

}  // namespace pst
