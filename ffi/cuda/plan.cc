// plan.cc: which launches transform a problem.
#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "launch.h"
#include "order_words.h"

namespace jax_hadacore::cuda {
namespace {

// Fewer elements than this a multiprocessor are few: they end soonest when spread thin.
constexpr int64_t kMany = 2048;

// How many consecutive rows a block takes. It works on one while the next is on its way, but all blocks that run at
// once wait for the last: the cost in quarters of a row, of which a block's start takes about one.
int64_t RowsPerBlock(const Kernel& kernel, int64_t rows, int64_t at_once) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t k = 1; k <= kernel.most_rows; ++k) {
    const int64_t cost = DivideUp(rows, k * at_once) * (4 * k + 1);
    if (cost < least) best = k, least = cost;
  }
  return best;
}

}  // namespace

// Gives a kernel the signs of a row's elements, if there are any, behind the words that it has already.
void AddSigns(Launch& launch, const Problem& p) {
  Work& work = launch.work;
  if (!p.signs) return;
  work.words_before_signs = static_cast<int>(launch.words.size());
  work.signs_last = p.signs_last;
  if (p.signs_on_device) {
    work.device_signs = p.signs;
  } else {
    launch.words.insert(launch.words.end(), p.signs, p.signs + SignWords(p.n));
  }
}

Launch OnRows(const Kernel& kernel, const void* x, void* y, int64_t rows, int64_t n, double scale, const Gpu& gpu) {
  Launch launch = {kernel, MakeWork(x, y, rows, n, 1, kernel.per_block, scale), 0, {}};
  Work& work = launch.work;
  const int64_t at_once = int64_t{kernel.blocks_per_processor} * gpu.processors;
  if (kernel.run_percent > 0 && rows >= 3 * at_once && rows <= kernel.most_turns * at_once) {
    work.runs = at_once;
    work.run_rows = rows * kernel.run_percent / 100 / at_once;
  } else if (kernel.most_rows > 1) {
    work.per_block = RowsPerBlock(kernel, rows, at_once);
  }
  const int64_t left = rows - work.runs * work.run_rows;
  launch.blocks = kernel.blocks_per_row * (work.runs + DivideUp(left, work.per_block));
  work.meet = kernel.blocks_per_row > 1 && x == y;
  return launch;
}

namespace {

// Two blocks that share a row can transform it in place where they can meet.
bool MaySplit(const Kernel& split, const void* x, const void* y, const Gpu& gpu) {
  return split.threads > 0 && split.shared_bytes <= gpu.shared_bytes && (gpu.clusters || x != y);
}

Launch OnRows(const RowsKernels& kernels, const void* x, void* y, int64_t rows, int64_t n, double scale,
              const Gpu& gpu) {
  if (rows * n <= kernels.split_elements * gpu.processors && MaySplit(kernels.split, x, y, gpu))
    return OnRows(kernels.split, x, y, rows, n, scale, gpu);
  const bool few = rows * n < kMany * gpu.processors || kernels.many.shared_bytes > gpu.shared_bytes;
  return OnRows(few ? kernels.few : kernels.many, x, y, rows, n, scale, gpu);
}

// The launch on the columns of (n, stride) tiles of A, up to kSharedVector long.
template <typename A, typename Out>
Launch OnColumns(const void* x, void* y, int64_t tiles, int64_t n, int64_t stride, double scale) {
  const int64_t columns = tiles * stride;
  const auto launch = [&](const Kernel& kernel, int64_t per_block) -> Launch {
    return {kernel, MakeWork(x, y, columns, n, stride, per_block, scale), DivideUp(columns, per_block), {}};
  };
  if constexpr (std::is_same_v<A, float>) {
    const int bits = Log2(n);
    if (bits > 0 && bits <= kColumnsBits && stride % ColumnsWidth(bits) == 0 && Aligned(x, y)) {
      const Kernel kernel = ColumnsKernel<Out>(bits);
      return launch(kernel, kernel.per_block);
    }
  }
  const Kernel kernel = SharedKernel<A, Out>(n);
  return launch(kernel, std::gcd(kernel.per_block, stride));  // all of a block's are in one tile
}

// The launch on columns of 16-bit elements.
template <typename T>
Launch OnStridedRows(const Problem& p, const Buffers& b) {
  const auto [kernel, columns, pieces] = FindStridedKernel<T>(Log2(p.n));
  Launch launch = {kernel, MakeWork(b.x, b.y, p.rows, p.n, p.stride, columns, p.scale), 0, {}};
  launch.work.aligned = Aligned(b.x, b.y) && p.stride % 8 == 0;
  launch.blocks = DivideUp(p.rows / p.stride * DivideUp(p.stride, columns), pieces);
  return launch;
}

// What the kernels of a type take and give, one pass after the other. Sums are kept in `between`, which may be x or y.
template <typename T>
struct Passes {
  using Sum = float;

  // Transforms `rows` rows of n = 2^m elements of x.
  static void OfElements(std::vector<Launch>& launches, const void* x, void* between, void* y, int64_t rows, int64_t n,
                         double scale, const Gpu& gpu) {
    if (n <= kOnePass) {
      launches.push_back(OnRows(FindRowsKernels<T, T>(Log2(n), Aligned(x, y)), x, y, rows, n, scale, gpu));
      return;
    }
    if (n == kOnePassSplit && gpu.clusters) {
      const Kernel split = FindRowsKernels<T, T>(Log2(n), Aligned(x, y)).split;
      if (MaySplit(split, x, y, gpu)) {
        launches.push_back(OnRows(split, x, y, rows, n, scale, gpu));
        return;
      }
    }
    const int64_t parts = n / kOnePass;
    launches.push_back(OnRows(FindRowsKernels<T, float>(Log2(kOnePass), Aligned(x, between)), x, between, rows * parts,
                              kOnePass, 1, gpu));
    launches.push_back(OnColumns<float, T>(between, y, rows, parts, kOnePass, scale));
  }

  // And of sums.
  static void OfSums(std::vector<Launch>& launches, void* sums, void* y, int64_t rows, int64_t n, double scale,
                     const Gpu& gpu) {
    if (n <= kSharedVector) {
      launches.push_back(OnRows(SharedKernel<float, T>(n), sums, y, rows, n, scale, gpu));
      return;
    }
    const int64_t part = std::min(n, kOnePass);
    launches.push_back(OnRows(FindRowsKernels<float, float>(Log2(part), Aligned(sums, sums)), sums, sums,
                              rows * (n / part), part, 1, gpu));
    launches.push_back(OnColumns<float, T>(sums, y, rows, n / part, part, scale));
  }
};

template <>
struct Passes<double> {
  using Sum = double;

  static void OfElements(std::vector<Launch>& launches, const void* x, void* between, void* y, int64_t rows, int64_t n,
                         double scale, const Gpu& gpu) {
    const auto kernel = SharedKernel<double, double>;
    if (n <= kSharedVector) {
      launches.push_back(OnRows(kernel(n), x, y, rows, n, scale, gpu));
      return;
    }
    const int64_t parts = n / kSharedVector;
    launches.push_back(OnRows(kernel(kSharedVector), x, between, rows * parts, kSharedVector, 1, gpu));
    launches.push_back(OnColumns<double, double>(between, y, rows, parts, kSharedVector, scale));
  }

  static void OfSums(std::vector<Launch>& launches, void* sums, void* y, int64_t rows, int64_t n, double scale,
                     const Gpu& gpu) {
    OfElements(launches, sums, sums, y, rows, n, scale, gpu);
  }
};

// ---- Factors one after the other. ----

// How many rows of a factor's matrix one launch has words for.
int64_t RowsOfLaunch(const Factor& factor, int64_t sum_bytes) {
  return kManyWords / (factor.values ? factor.order * sum_bytes / 4 : SignWords(factor.order));
}

// Multiplies the factor's index of (tiles, order, stride) arrays; y may be x where one launch does it.
template <typename In, typename Sum>
void MultiplyByFactor(std::vector<Launch>& launches, const Factor& factor, const void* x, void* y, int64_t tiles,
                      int64_t stride) {
  const int64_t most = RowsOfLaunch(factor, sizeof(Sum));
  for (int64_t first = 0; first < factor.order; first += most) {
    const int64_t rows = std::min(most, factor.order - first);
    const Kernel kernel = FactorKernel<In, Sum>(factor.order, factor.values);
    Launch launch = {kernel,
                     MakeWork(x, y, tiles * stride, factor.order, stride, kernel.per_block, 1),
                     DivideUp(tiles * stride, kernel.per_block),
                     {}};
    launch.work.order = static_cast<int>(first);
    launch.work.columns = static_cast<int>(rows);
    if (factor.values) {
      const std::vector<Sum> values(factor.values + first * factor.order,
                                    factor.values + (first + rows) * factor.order);
      launch.words.resize(values.size() * sizeof(Sum) / sizeof(uint32_t));
      std::memcpy(launch.words.data(), values.data(), values.size() * sizeof(Sum));
    } else {
      const uint32_t* const signs = factor.signs + first * SignWords(factor.order);
      launch.words = Words(signs, signs + rows * SignWords(factor.order));
    }
    launches.push_back(std::move(launch));
  }
}

// A transform and its signs in one pass; none where no such kernel serves.
template <typename T>
std::optional<Launch> OnSignedRows(const Problem& p, const Buffers& b, const Gpu& gpu) {
  if (!p.signs || p.factor_count > 0 || p.n > kOnePass || !Aligned(b.x, b.y)) return std::nullopt;
  const RowsKernels kernels = FindRowsKernels<T, T>(Log2(p.n), true);
  const bool fits = kernels.signed_rows.shared_bytes <= gpu.shared_bytes;
  Launch launch =
      OnRows(fits ? kernels.signed_rows : kernels.signed_rows_anywhere, b.x, b.y, p.rows, p.n, p.scale, gpu);
  AddSigns(launch, p);
  return launch;
}

template <typename T>
void ApplySigns(std::vector<Launch>& launches, const Problem& p, const void* x, void* y) {
  constexpr int64_t kMost = 32 * kManyWords;
  for (int64_t first = 0; first < p.n; first += kMost) {
    const int64_t band = p.signs_on_device ? p.n : std::min(kMost, p.n - first);
    const Kernel kernel = SignsKernel<T>();
    Launch launch = {kernel,
                     MakeWork(x, y, p.rows * band, p.n, 1, kernel.per_block, 1),
                     DivideUp(p.rows * band, kernel.per_block),
                     {}};
    launch.work.order = static_cast<int>(first);
    launch.work.columns = static_cast<int>(band);
    launch.work.words_before_signs = 0;
    if (p.signs_on_device) {
      launch.work.device_signs = p.signs;
      launches.push_back(std::move(launch));
      return;
    }
    const uint32_t* const signs = p.signs + first / 32;
    launch.words = Words(signs, signs + SignWords(band));
    launches.push_back(std::move(launch));
  }
}

// One pass after the other, what comes first in the row's sum first.
template <typename T, typename Storage>
std::vector<Launch> PlanFor(const Problem& p, const Buffers& b, const Gpu& gpu) {
  if constexpr (!std::is_same_v<T, double>) {
    if (p.stride > 1) {
      if constexpr (std::is_same_v<T, float>) {
        return {OnColumns<float, float>(b.x, b.y, p.rows / p.stride, p.n, p.stride, p.scale)};
      } else {
        return {OnStridedRows<T>(p, b)};
      }
    }
  }
  if (OnePassOfOrders(p, gpu.shared_bytes)) return {OnOrders(p, b, gpu)};
  if constexpr (!std::is_same_v<T, double>)
    if (auto launch = OnSignedRows<T>(p, b, gpu)) return {*std::move(launch)};
  std::vector<Launch> launches;
  const void* x = b.x;
  if (p.signs && !p.signs_last) {
    ApplySigns<Storage>(launches, p, x, b.y);
    x = b.y;
  }
  void* const between = NeedsWorkspace(p) ? b.workspace : b.y;
  if (p.factor_count == 0) {
    Passes<T>::OfElements(launches, x, between, b.y, p.rows, p.n, p.scale, gpu);
  } else {
    using Sum = typename Passes<T>::Sum;
    // The last factor, whose order is the largest, comes first, as it may take several launches.
    const Factor& last = p.factors[p.factor_count - 1];
    const int64_t power = PowerOfTwo(p), stride = power * last.order;
    MultiplyByFactor<T, Sum>(launches, last, x, between, p.rows * (p.n / stride), power);
    if (p.factor_count == 2) MultiplyByFactor<Sum, Sum>(launches, p.factors[0], between, between, p.rows, stride);
    Passes<T>::OfSums(launches, between, b.y, p.rows * (p.n / power), power, p.scale, gpu);
    launches.back().work.scale_rest = RestOfScale(p.scale);
  }
  if (p.signs && p.signs_last) ApplySigns<Storage>(launches, p, b.y, b.y);
  return launches;
}

}  // namespace

bool TakesStride(const Problem& p) {
  const bool is_power = p.n > 0 && !(p.n & (p.n - 1)), plain = p.factor_count == 0 && !p.signs;
  return p.stride == 1 || (is_power && plain && p.dtype != Dtype::kF64 && p.n >= kLeastStrided &&
                           p.n <= (Is16Bit(p) ? kMostStrided16 : kMostStrided32));
}

bool NeedsWorkspace(const Problem& problem) {
  if (problem.factor_count == 0) return Is16Bit(problem) && problem.n > kOnePass;
  return !OnePassOfOrders(problem, kLeastShared);
}

std::vector<Launch> Plan(const Problem& problem, const Buffers& buffers, const Gpu& gpu) {
  switch (problem.dtype) {
    case Dtype::kF16: return PlanFor<F16, uint16_t>(problem, buffers, gpu);
    case Dtype::kBF16: return PlanFor<BF16, uint16_t>(problem, buffers, gpu);
    case Dtype::kF32: return PlanFor<float, float>(problem, buffers, gpu);
    case Dtype::kF64: return PlanFor<double, double>(problem, buffers, gpu);
  }
  return {};
}

}  // namespace jax_hadacore::cuda
