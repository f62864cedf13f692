// order_plan.cc: the launch that transforms rows whose length is no power of two in one pass.
#include <algorithm>
#include <cstdint>
#include <optional>

#include "kernels.h"
#include "order_ring.h"
#include "order_words.h"
#include "pair_ring.h"
#include "plan.h"
#include "tensor_map.h"

namespace jax_hadacore::cuda {
namespace {

// How a kernel of order_rows.cuh or group_rows.cuh sees a row.
struct OrderLayout {
  const Factor* first;   // the factor of the first step
  const Factor* second;  // that of the columns, or null
  int64_t power;         // of two, in the first step
  int width;
  int columns;
};

// Into how many columns OrderRows puts the power of two: of what is left the first step takes care, which pads its
// matrix to whole tiles and costs a product for each; in registers each bit of the columns costs additions.
int64_t BestColumns(int64_t order, int64_t power) {
  constexpr double kFixed = 450, kTile = 40, kBit = 64;  // instructions for a tile of 16 by 16 groups
  int64_t best = 1;
  double least = 0;
  for (int64_t columns = power > 1 ? 2 : 1; columns <= std::min<int64_t>(power, kMostColumns); columns *= 2) {
    const int64_t rows = order * (power / columns), tiles = DivideUp(rows, 16);
    const double wide = columns > 16 ? 1.03 : 1;  // fewer warps have room
    const double cost = wide * static_cast<double>(tiles * 16) / static_cast<double>(rows) *
                        (kFixed + kTile * static_cast<double>(tiles) + kBit * Log2(columns));
    if (least == 0 || cost < least) best = columns, least = cost;
  }
  return best;
}

// None where no such kernel serves. Looks at the lengths alone.
std::optional<OrderLayout> FindOrderLayout(const Problem& p) {
  if (!Is16Bit(p) || p.factor_count == 0 || p.factors[0].values) return std::nullopt;
  const Factor &slow = p.factors[0], &last = p.factors[p.factor_count - 1];
  // Elements come in pairs of neighbouring rows of the first matrix.
  if (last.order % 2) return std::nullopt;
  const int64_t power = PowerOfTwo(p);
  if (p.factor_count == 1) {
    const int64_t width = std::min<int64_t>(power, 8), columns = BestColumns(last.order, power / width);
    return OrderLayout{&last, nullptr, power / width / columns, static_cast<int>(width), static_cast<int>(columns)};
  }
  const int width = slow.order <= MostColumns(8) ? 8 : 4;
  if (slow.order > MostColumns(width) || power < width) return std::nullopt;
  return OrderLayout{&last, &slow, power / width, width, static_cast<int>(slow.order)};
}

// The words of the second step's matrix, as many to a row of it as GroupShape says (kWordsOfColumn).
int64_t SecondStepSize(const OrderLayout& layout) {
  return layout.second ? MostColumns(layout.width) * SignWords(MostColumns(layout.width)) : 0;
}

int64_t OrderWords(const Problem& p, const OrderLayout& layout) {
  return FirstStepSize(layout.first->order * layout.power) + SecondStepSize(layout) +
         (p.signs && !p.signs_on_device ? SignWords(p.n) : 0);
}

constexpr int64_t kZeros = 16 * kMostColumns;  // bytes of shared memory behind a block's rows

// Whether one pass serves, with so many bytes of shared memory to a block.
std::optional<OrderLayout> OnePassOrder(const Problem& p, int64_t shared_bytes) {
  const std::optional<OrderLayout> layout = FindOrderLayout(p);
  if (!layout || OrderWords(p, *layout) >= kManyWords || 2 * p.n + kZeros > shared_bytes) return std::nullopt;
  return layout;
}

// How a block is made up.
struct OrderBlock {
  int64_t rows, warps;
};

constexpr double kInFlight = 40 * 1024;  // bytes of rows that a multiprocessor should hold

// As many busy warps on a multiprocessor as possible.
OrderBlock ChooseBlock(const Kernel& kernel, const OrderLayout& layout, int64_t order, const Problem& p,
                       const Gpu& gpu) {
  const int64_t most_warps = kernel.threads / 32, room = gpu.shared_bytes - kZeros;
  // A warp's columns are of one row or of several, and a block's first row is to be aligned.
  const int64_t tasks_of_part = DivideUp(order, 16), rows_of_part = layout.second ? 1 : DivideUp(16, layout.columns);
  const int64_t least = DivideUp(8, p.n & -p.n);
  int64_t most_rows = std::min({DivideUp(p.rows, gpu.processors), room / (2 * p.n), rows_of_part * most_warps});
  most_rows = std::max<int64_t>(most_rows / least * least, 2 * p.n * least <= room ? least : 1);
  OrderBlock best{};
  double most = 0;
  for (int64_t parts = 1; parts <= most_warps; ++parts) {
    const int64_t rows = std::min(parts * rows_of_part, most_rows),
                  tasks = tasks_of_part * DivideUp(rows, rows_of_part);
    if (rows % least && rows != most_rows) continue;
    for (int64_t warps = 1; warps <= std::min(most_warps, tasks); ++warps) {
      const int64_t bytes = 2 * p.n * rows + kZeros + kReserved;
      const int64_t blocks =
          std::max<int64_t>(1, std::min(2 * most_warps / warps, (gpu.shared_bytes + kReserved) / bytes));
      // One task after the other takes a block longer, and so it holds its memory longer; and too few bytes may be on
      // their way at once.
      const auto rounds = static_cast<double>(DivideUp(tasks, warps));
      const double busy = static_cast<double>(tasks * blocks) / rounds / (0.8 + 0.2 * rounds) *
                          std::min(1.0, static_cast<double>(blocks * bytes) / kInFlight);
      if (busy > most) most = busy, best = {rows, warps};
    }
  }
  return best;
}

Launch OnOrderRows(const Problem& p, const OrderLayout& layout, const Buffers& b, const Gpu& gpu) {
  const int64_t order = layout.first->order * layout.power;
  const int words = static_cast<int>(OrderWords(p, layout));
  const bool half = p.dtype == Dtype::kF16, two_orders = layout.second, grouped = two_orders || layout.columns == 1;
  const auto order_rows = half ? OrderRowsKernel<F16> : OrderRowsKernel<BF16>;
  const auto group_rows = half ? GroupRowsKernel<F16> : GroupRowsKernel<BF16>;
  Launch launch = {grouped ? group_rows(layout.width, two_orders) : order_rows(Log2(layout.columns), words),
                   MakeWork(b.x, b.y, p.rows, p.n, 1, 1, p.scale),
                   0,
                   {}};

  const OrderBlock block = ChooseBlock(launch.kernel, layout, order, p, gpu);
  launch.kernel.threads = static_cast<int>(32 * block.warps);
  launch.kernel.shared_bytes = static_cast<int>(2 * p.n * block.rows + kZeros);
  launch.blocks = DivideUp(p.rows, block.rows);

  Work& work = launch.work;
  work.per_block = block.rows;
  work.order = static_cast<int>(order);
  work.columns = layout.columns;
  work.aligned = Aligned(b.x, b.y) && block.rows * p.n % 8 == 0;

  launch.words = *FirstStepWords(*layout.first, layout.power);
  if (two_orders) {
    const int64_t most = MostColumns(layout.width);
    AppendFactor(launch.words, *layout.second, most, SignWords(most));
  }
  AddSigns(launch, p);
  return launch;
}

// Gives a ring as many parts as there is room for, and at least as many as it needs: one is to come while another is
// read, and from one tile of a warp group to its next are no more than all.
template <typename Layout>
bool Fill(Layout& ring, int most, const Gpu& gpu) {
  const int least = std::max(2, TileStride(ring.Tiles()));
  for (ring.parts = most; ring.parts >= least; --ring.parts)
    if (ring.Bytes() <= gpu.shared_bytes) return true;
  ring.parts = 0;
  return false;
}

// What a ring's kernel is told of it.
template <typename Layout>
void SetRing(Launch& launch, const Layout& ring) {
  launch.kernel.shared_bytes = ring.Bytes();
  Work& work = launch.work;
  work.runs = launch.blocks;
  work.order = ring.order;
  work.columns = ring.columns;
  work.ring = ring.parts;
}

constexpr int64_t kLeastOfRing = 5120;  // elements
constexpr int kMostParts = 16;

// How OrderRing sees a row; none where it does not serve, or was no faster than OrderRows. All rows of a length go one
// way: the sums of the two differ.
std::optional<RingLayout> FindRing(const Problem& p, const OrderLayout& layout, const Gpu& gpu) {
  constexpr int kPartsForFewColumns = 4;
  if (!gpu.warp_groups || layout.second || p.n < kLeastOfRing) return std::nullopt;
  // The matrix as elements if it fits; then results in long lines. None has no parts.
  const auto make = [&](int64_t columns) {
    RingLayout ring = {static_cast<int>(columns), static_cast<int>(p.n / 8 / columns), 0, false, 0};
    for (const bool elements : {true, false})
      for (const int together : {columns == 16 ? 16 : 8, 8}) {
        ring.elements = elements, ring.together = together;
        if (Fill(ring, kMostParts, gpu)) return ring;
      }
    return ring;
  };
  const int64_t power = PowerOfTwo(p) / 8, columns = std::min<int64_t>(power, kMostRingColumns);
  if (columns < 4) return std::nullopt;
  RingLayout ring = make(columns);
  // Tiles are padded to 64 a's. Where that costs most, half as many columns serve, which have twice as many a's.
  if (columns == kMostRingColumns && 7 * ring.order < 4 * 64 * ring.Tiles()) {
    const RingLayout other = make(columns / 2);
    if (other.parts >= kPartsForFewColumns) ring = other;
  }
  const int64_t signs = p.signs && !p.signs_on_device ? SignWords(p.n) : 0;
  if (ring.parts == 0 || kMapWords + FirstStepSize(ring.order) + 4 + signs > kManyWords) return std::nullopt;
  return ring;
}

Launch OnRing(const Kernel& kernel, const Problem& p, const RingLayout& ring, const Buffers& b, const Gpu& gpu) {
  const int64_t parts = DivideUp(p.rows, ring.RowsOfPart());
  Launch launch = {kernel,
                   MakeWork(b.x, b.y, p.rows, p.n, 1, ring.RowsOfPart(), p.scale),
                   std::min<int64_t>(parts, gpu.processors),
                   {}};
  SetRing(launch, ring);
  std::optional<Words> map;
  if (Aligned(b.x, b.y) && p.n % 8 == 0) map = TensorMap(b.x, p.rows, p.n, ring);
  launch.work.aligned = map.has_value();
  launch.words = map.value_or(Words(kMapWords));
  const Words& matrix = *FirstStepWords(p.factors[0], ring.order / p.factors[0].order);
  launch.words.insert(launch.words.end(), matrix.begin(), matrix.end());
  AddSigns(launch, p);
  return launch;
}

// How PairRing sees a row; none where it does not serve, or most of its columns would be zeros. Powers of two beyond
// the groups go to the first step.
std::optional<PairLayout> FindPairs(const Problem& p, const OrderLayout& layout, const Gpu& gpu) {
  constexpr int kMostParts = 4;
  if (!gpu.warp_groups || !layout.second) return std::nullopt;
  const int order = static_cast<int>(layout.second->order);
  PairLayout ring{};
  if (PowerOfTwo(p) >= 16 && order <= 12) {
    ring.width = 8, ring.apart = 2, ring.eights = 3;
  } else {
    ring.width = 4, ring.apart = 1, ring.eights = order > 40 ? 6 : 5;
  }
  ring.columns = order * ring.apart;
  ring.order = static_cast<int>(p.n / (ring.columns * ring.width));
  if (order % 2 || ring.columns <= 4 * ring.eights || ring.columns > 8 * ring.eights) return std::nullopt;
  const int64_t signs = p.signs && !p.signs_on_device ? SignWords(p.n) : 0;
  if (!Fill(ring, kMostParts, gpu) || FirstStepSize(ring.order) + order * SignWords(order) + signs > kManyWords)
    return std::nullopt;
  return ring;
}

Launch OnPairs(const Problem& p, const OrderLayout& layout, const PairLayout& ring, const Buffers& b, const Gpu& gpu) {
  const auto find = p.dtype == Dtype::kF16 ? PairRingKernel<F16> : PairRingKernel<BF16>;
  Launch launch = {find(ring.width, ring.eights), MakeWork(b.x, b.y, p.rows, p.n, 1, 1, p.scale),
                   std::min<int64_t>(p.rows, gpu.processors),
                   *FirstStepWords(*layout.first, ring.order / layout.first->order)};
  const int64_t order = layout.second->order;
  AppendFactor(launch.words, *layout.second, order, SignWords(order));
  SetRing(launch, ring);
  launch.work.aligned = Aligned(b.x, b.y) && p.n % 8 == 0;
  AddSigns(launch, p);
  return launch;
}

// How OrderFloats sees a row: the order times a part of the power of two.
struct FloatLayout {
  int64_t order, power;

  explicit FloatLayout(const Problem& p) : order(p.factors[0].order), power(PowerOfTwo(p)) {
    // Operands are padded to 8, and sums to 16 or 8: a small order fills them twice.
    constexpr int64_t kFull = 24;
    for (; 2 * order <= kFull && power >= 2 * kLeastFloatPower; order *= 2) power /= 2;
  }
};

// The bytes of shared memory that it needs for so many elements.
int64_t FloatBytes(int64_t elements) { return DivideUp(elements, 32) * 128; }

// Whether it serves, with so many bytes of shared memory to a block.
bool OnePassFloats(const Problem& p, int64_t shared_bytes) {
  if (p.dtype != Dtype::kF32 || p.factor_count != 1 || p.factors[0].values) return false;
  const FloatLayout layout(p);
  const int64_t signs = p.signs && !p.signs_on_device ? SignWords(p.n) : 0;
  return layout.order <= kMostFloatOrder && layout.power <= kMostFloatPower &&
         FloatBytes(p.n) <= std::min<int64_t>(shared_bytes, kMostFloatBytes) &&
         FirstStepSize(layout.order) + signs < kManyWords;
}

Launch OnFloats(const Problem& p, const Buffers& b, const Gpu& gpu) {
  const FloatLayout layout(p);
  const bool staged = layout.power < kLeastFloatPower || !Aligned(b.x, b.y);
  Launch launch = {staged ? OrderFloatsKernel<true>(layout.order) : OrderFloatsKernel<false>(layout.order),
                   MakeWork(b.x, b.y, p.rows, p.n, 1, 1, p.scale), 0,
                   *FirstStepWords(p.factors[0], layout.order / p.factors[0].order)};
  Work& work = launch.work;
  constexpr int64_t kBlock = 24 * 1024;  // bytes of short rows
  work.per_block = std::max<int64_t>(1, std::min(DivideUp(p.rows, gpu.processors), kBlock / (4 * p.n)));
  work.aligned = Aligned(b.x, b.y) && work.per_block * p.n % 4 == 0;
  work.order = static_cast<int>(layout.order);
  work.columns = static_cast<int>(layout.power);
  work.scale_rest = RestOfScale(p.scale);
  launch.blocks = DivideUp(p.rows, work.per_block);
  // The threads that a multiprocessor has registers for are shared by as many blocks as have room.
  constexpr int64_t kLeastThreads = 128;
  Kernel& kernel = launch.kernel;
  kernel.shared_bytes = static_cast<int>(FloatBytes(p.n * work.per_block));
  const int64_t blocks = std::clamp<int64_t>((gpu.shared_bytes + kReserved) / (kernel.shared_bytes + kReserved), 1,
                                             kernel.threads / kLeastThreads);
  kernel.threads = std::min(static_cast<int>(kernel.threads / blocks / 32 * 32), MostFloatThreads(kernel.threads));
  AddSigns(launch, p);
  return launch;
}

}  // namespace

bool OnePassOfOrders(const Problem& p, int64_t shared_bytes) {
  return OnePassOrder(p, shared_bytes) || OnePassFloats(p, shared_bytes);
}

Launch OnOrders(const Problem& p, const Buffers& b, const Gpu& gpu) {
  const std::optional<OrderLayout> layout = OnePassOrder(p, gpu.shared_bytes);
  if (!layout) return OnFloats(p, b, gpu);
  if (const auto ring = FindRing(p, *layout, gpu))
    return OnRing(p.dtype == Dtype::kF16 ? OrderRingKernel<F16>(*ring) : OrderRingKernel<BF16>(*ring), p, *ring, b,
                  gpu);
  if (const auto ring = FindPairs(p, *layout, gpu)) return OnPairs(p, *layout, *ring, b, gpu);
  return OnOrderRows(p, *layout, b, gpu);
}

std::optional<Launch> CodesOnRing(const Problem& p, Formats formats, const void* x, void* codes, const Gpu& gpu) {
  RingLayout ring = {kMostRingColumns, static_cast<int>(p.n / 8 / kMostRingColumns), kTogetherForCodes, true, 0};
  // A tile of a row that waits for the others keeps its warp group.
  if (!gpu.warp_groups || p.n < kLeastOfRing || ring.Tiles() > kRingMultipliers || !Fill(ring, kMostParts, gpu) ||
      !ring.HasSpans())
    return std::nullopt;
  const Kernel kernel = p.dtype == Dtype::kF16 ? QuantizedRingKernel<F16>(formats) : QuantizedRingKernel<BF16>(formats);
  return OnRing(kernel, p, ring, {x, codes, nullptr}, gpu);
}

}  // namespace jax_hadacore::cuda
