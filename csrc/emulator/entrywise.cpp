#include "../cuda/entrywise.cu"

#include "cases.h"

using namespace loraforge::cuda;
using loraforge::PhiloxKey;

namespace {

PhiloxKey key_of(const int64_t* halves) {
  return {static_cast<uint64_t>(halves[0]), static_cast<uint64_t>(halves[1])};
}

// left<i> and, of a low-rank source, right<i>.
EntrySource source_of(const emulator::Case& c, const std::string& i) {
  EntrySource source{};
  source.left = c.data("left" + i);
  source.kind = c.kind("left" + i);
  source.ld_left = c.size("left" + i, 1);
  source.scaling = 1.0;
  if (c.has("right" + i)) {
    source.right = c.data<double>("right" + i);
    source.ld_right = c.size("right" + i, 1);
    source.r = c.size("right" + i, 0);
  }
  return source;
}

} // namespace

// rules (count, 4): scaling, weight, low, high; keys (count, 2); columns of the sources beyond n are not looked at.
LF_CASE(entry_merge) {
  const int64_t count = c.size("rules", 0), n = c.integer("n"), t = c.size("left0", 0);
  std::vector<EntrySource> sources;
  for (int64_t i = 0; i < count; ++i) {
    const double* rule = c.data<double>("rules") + 4 * i;
    EntrySource source = source_of(c, std::to_string(i));
    source.scaling = rule[0], source.weight = rule[1], source.low = rule[2], source.high = rule[3];
    source.key = key_of(c.data<int64_t>("keys") + 2 * i);
    sources.push_back(source);
  }
  const std::string dtype = c.integer("wide") ? "f64" : "f32";
  const EntryRule rule{
      static_cast<uint64_t>(c.integer("limit")), c.number("gain"), static_cast<uint64_t>(c.integer("first") * n),
      c.integer("elect") != 0};
  void* out = c.make("out", dtype, {t, n});
  void* sizes = count > kEntrySources ? c.make("sizes", dtype, {t, n}) : nullptr;
  int* votes = count > kEntrySources ? c.make<int>("votes", "i32", {t, n}) : nullptr;
  return entry_merge(
      dtype == "f64" ? Float::f64 : Float::f32, sources.data(), static_cast<int>(count), rule, t, n, out, sizes, votes,
      nullptr);
}

LF_CASE(entry_counts) {
  const EntrySource source = source_of(c, "");
  const int64_t low = c.integer("low"), high = c.integer("high"), prefixes = c.size("prefixes", 0);
  const int64_t size = int64_t{1} << (high - low);
  int64_t* counts = c.make<int64_t>("counts", "i64", {prefixes, size});
  std::memset(counts, 0, static_cast<size_t>(prefixes * size) * sizeof(int64_t));
  return entry_counts(
      c.integer("wide") ? Float::f64 : Float::f32, c.integer("compared_wide") != 0, source, c.data<int64_t>("prefixes"),
      static_cast<int>(prefixes), static_cast<int>(low), static_cast<int>(high), c.size("left", 0),
      source.right ? c.size("right", 1) : c.size("left", 1), counts, nullptr);
}

// The tile's rows are ld entries long, of which n belong to it.
LF_CASE(drop_rescale) {
  const emulator::Array& tile = c.array("tile");
  const int64_t t = tile.shape.at(0), ld = tile.shape.at(1), n = c.integer("n");
  void* out = c.make("tile", tile.dtype, {t, ld});
  std::memcpy(out, tile.bytes.get(), tile.size);
  const EntryRule rule{
      static_cast<uint64_t>(c.integer("limit")), c.number("gain"), static_cast<uint64_t>(c.integer("first") * n), false};
  return drop_rescale(c.kind("tile"), out, ld, t, n, key_of(c.data<int64_t>("key")), rule, nullptr);
}
