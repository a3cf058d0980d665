// The CUDA kernels against an obvious version of each operation, played on the CPU (cuda_emulation.h).
//
//     cuda_logic_test ROUNDS SEED
//
// Every buffer is an allocation of its own of exactly its size, so that the address sanitizer sees what lies outside.
#include "cuda_emulation.h"

#include <cmath>
#include <memory>
#include <numeric>
#include <string>

#include "cpu/dtypes.h"
#include "cuda/kernels.h"
#include "cuda/workspace.cuh"

namespace {

using namespace distopt::cuda;
namespace cpu = distopt::cpu;

std::mt19937_64 generator;
int num_checks = 0;
int num_from_candidates = 0;
int num_from_all = 0;

int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool chance(double p) { return std::bernoulli_distribution(p)(generator); }

void require(bool condition, const char* what, const std::string& about) {
  ++num_checks;
  if (condition) return;
  fprintf(stderr, "FAILED: %s (%s)\n", what, about.c_str());
  abort();
}

// Elements as bits, in an allocation that may begin anywhere an element may.
struct Array {
  DType dtype;
  int64_t numel;
  int64_t shift;
  std::unique_ptr<char[]> memory;

  Array(DType type, int64_t n, int64_t begin_at = 0)
      : dtype(type), numel(n), shift(begin_at), memory(new char[(n + begin_at) * width() + 1]) {
    memset(memory.get(), 0x5a, (n + begin_at) * width());
  }
  Array(const Array& other) : Array(other.dtype, other.numel, other.shift) {
    memcpy(data(), other.data(), numel * width());
  }
  int64_t width() const { return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2; }
  char* data() const { return memory.get() + shift * width(); }

  float get(int64_t i) const {
    if (dtype == DType::kFloat32) return cpu::load(reinterpret_cast<const float*>(data()) + i);
    if (dtype == DType::kBFloat16) return cpu::load(reinterpret_cast<const cpu::BFloat16*>(data()) + i);
    return cpu::load(reinterpret_cast<const cpu::Float16*>(data()) + i);
  }
  void set(int64_t i, float x) {
    if (dtype == DType::kFloat32) {
      cpu::store(reinterpret_cast<float*>(data()) + i, x);
    } else if (dtype == DType::kBFloat16) {
      cpu::store(reinterpret_cast<cpu::BFloat16*>(data()) + i, x);
    } else {  // rounds towards zero, which is enough to make inputs
      const uint32_t bits = cpu::to_bits(x);
      const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127;
      uint16_t half = bits >> 16 & 0x8000;
      if (std::isnan(x)) {
        half |= 0x7c01 | (bits >> 13 & 0x3ff);
      } else if (exponent > 15) {
        half |= 0x7c00;
      } else if (exponent >= -14) {
        half |= (exponent + 15) << 10 | (bits >> 13 & 0x3ff);
      } else if (exponent >= -24) {
        half |= (0x400 | (bits >> 13 & 0x3ff)) >> (-14 - exponent);
      }
      reinterpret_cast<uint16_t*>(data())[i] = half;
    }
  }
  bool equals(const Array& other) const {
    for (int64_t i = 0; i < numel; ++i) {
      if (memcmp(data() + i * width(), other.data() + i * width(), width()) == 0) continue;
      if (!(std::isnan(get(i)) && std::isnan(other.get(i)))) return false;
    }
    return true;
  }
};

const char* const kKinds[] = {"normal",    "laplace",    "ties",   "equal", "zeros",     "denormal", "special",
                              "ascending", "descending", "spikes", "wide",  "clustered", "one in 32"};
constexpr int kNumKinds = sizeof kKinds / sizeof *kKinds;

void fill(Array& a, int kind) {
  std::normal_distribution<float> normal;
  const float constant = normal(generator);
  const uint32_t specials[] = {0x7f800001, 0xffc00000, 0x7fffffff, 0x7f800000, 0xff800000,
                               0,          0x80000000, 1,          0x7f61b1e6};
  for (int64_t i = 0; i < a.numel; ++i) {
    float x = normal(generator);
    switch (kind) {
      case 1:
        x = std::copysign(std::exp(std::abs(x) * 3), x);
        break;
      case 2:
        x = static_cast<float>(uniform(-3, 3));
        break;
      case 3:
        x = constant;
        break;
      case 4:
        x = chance(0.5) ? 0.0f : -0.0f;
        break;
      case 5:
        x *= 1e-40f;
        break;
      case 6:
        if (chance(0.3)) x = cpu::from_bits(specials[uniform(0, 8)]);
        break;
      case 7:
        x = static_cast<float>(i) + 1;
        break;
      case 8:
        x = -static_cast<float>(a.numel - i);
        break;
      case 9:
        x = chance(0.01) ? x * 1e6f : 0;
        break;
      case 10:
        x *= std::exp(normal(generator) * 20);
        break;
      case 11:
        x *= i / 700 % 5 == 0 ? 1000.0f : 1.0f;
        break;
      case 12:
        x *= i % 32 == 0 ? 1000.0f : 1.0f;
        break;
    }
    a.set(i, x);
  }
}

// The k largest by key, ties to the lowest index, ascending.
std::vector<int64_t> largest(const std::vector<int32_t>& keys, int64_t k) {
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

struct Rows {
  std::vector<int64_t> table;
  int64_t num = 0;
  int64_t grad_numel = 0;
  int64_t state_numel = 0;
  int64_t count = 0;
};

int64_t random_numel(int64_t most_elements) {
  switch (uniform(0, 3)) {
    case 0:
      return uniform(0, 9);
    case 1:
      return least(most_elements, kSmall + uniform(-2, 2));
    case 2:
      return uniform(0, least(most_elements, 3 * kTile));
    default:
      return uniform(0, most_elements);
  }
}

int64_t random_k(int64_t n) {
  const double parts[] = {0, 0.001, 0.01, 0.03, 0.06, 0.3, 1};
  if (chance(0.1)) return uniform(0, n);
  return least(n, static_cast<int64_t>(std::ceil(static_cast<double>(n) * parts[uniform(0, 6)])));
}

Rows random_rows(int64_t num, int64_t most_elements) {
  Rows rows;
  for (int64_t s = 0; s < num; ++s) {
    const int64_t gap = chance(0.5) ? 0 : uniform(0, 7);
    const int64_t n = random_numel(most_elements), k = random_k(n);
    rows.table.insert(rows.table.end(), {rows.grad_numel + gap, n, k});
    rows.grad_numel += gap + n;
    rows.state_numel += n;
    rows.count += k;
  }
  rows.grad_numel += uniform(0, 3);
  rows.num = num;
  return rows;
}

void expect(const Sparsify& job, const Rows& rows, const Array& grad, Array& u, Array& v, Array& values,
            std::vector<int32_t>& indices) {
  int64_t state = 0, out = 0;
  for (int64_t s = 0; s < rows.num; ++s) {
    const int64_t start = rows.table[3 * s], n = rows.table[3 * s + 1], k = rows.table[3 * s + 2];
    std::vector<int32_t> keys(n);
    for (int64_t i = 0; i < n; ++i) {
      volatile float product, sum;  // no contraction, whatever the flags
      if (job.update != Update::kNone) {
        const float g = grad.get(start + i), m = job.momentum;
        float new_v = v.get(state + i);
        if (job.update == Update::kAccumulate) {
          sum = new_v + g;
          new_v = sum;
        } else if (job.update == Update::kHeavyBall) {
          product = u.get(state + i) * m;
          sum = product + g;
          u.set(state + i, sum);
          sum = new_v + sum;
          new_v = sum;
        } else {
          sum = u.get(state + i) + g;
          product = sum * m;
          u.set(state + i, product);
          sum = product + g;
          sum = new_v + sum;
          new_v = sum;
        }
        v.set(state + i, new_v);
      }
      keys[i] = cpu::key_of(v.get(state + i));
    }
    for (const int64_t i : largest(keys, k)) {
      indices[out] = static_cast<int32_t>(start + i);
      values.set(out++, v.get(state + i));
      if (job.update == Update::kNone) continue;
      v.set(state + i, 0);
      if (job.masking && job.u) u.set(state + i, 0);
    }
    state += n;
  }
}

void check_sparsify(const Rows& rows, bool with_table, Update update, DType grad_dtype, DType state_dtype, int kind) {
  const bool velocity = update == Update::kHeavyBall || update == Update::kNesterov;
  const int64_t shifted = chance(0.3) ? uniform(1, 3) : 0;
  Array grad(grad_dtype, rows.grad_numel, chance(0.3) ? uniform(1, 3) : 0);
  Array u(state_dtype, rows.state_numel, chance(0.1) ? uniform(1, 3) : shifted),
      v(state_dtype, rows.state_numel, shifted);
  fill(grad, kind);
  fill(v, chance(0.7) ? kind : static_cast<int>(uniform(0, kNumKinds - 1)));
  fill(u, 0);
  const DType value_dtype = update == Update::kNone ? state_dtype : DType::kFloat32;
  Array values(value_dtype, rows.count), want_values(value_dtype, rows.count);
  std::unique_ptr<int32_t[]> indices(new int32_t[rows.count]);
  std::unique_ptr<int64_t[]> table(new int64_t[rows.table.size()]);
  std::copy(rows.table.begin(), rows.table.end(), table.get());
  Sparsify job;
  job.update = update;
  job.grad_dtype = grad_dtype;
  job.state_dtype = state_dtype;
  job.grad = grad.data();
  job.grad_numel = update == Update::kNone ? rows.state_numel : rows.grad_numel;
  job.u = velocity ? u.data() : nullptr;
  job.v = v.data();
  job.state_numel = rows.state_numel;
  job.segments = with_table ? table.get() : nullptr;
  job.num_segments = rows.num;
  job.count = rows.count;
  job.momentum = chance(0.5) ? 0.9f : 0.0f;
  job.masking = chance(0.5);
  job.values = values.data();
  job.indices = indices.get();
  const Array grad_before(grad);
  Array want_u(u), want_v(v);
  std::vector<int32_t> want_indices(rows.count);
  expect(job, rows, grad, want_u, want_v, want_values, want_indices);

  const size_t bytes = sparsify_workspace_bytes(rows.state_numel, rows.num, rows.count);
  std::unique_ptr<char[]> workspace(new char[bytes]);
  memset(workspace.get(), 0x77, bytes);
  const std::string about = std::string(kKinds[kind]) + ", update " + std::to_string(static_cast<int>(update)) +
                            ", states " + std::to_string(rows.state_numel) + " in " + std::to_string(rows.num) +
                            " segments, count " + std::to_string(rows.count);
  require(sparsify(job, workspace.get(), nullptr) == cudaSuccess, "launches", about);
  require(std::equal(want_indices.begin(), want_indices.end(), indices.get()), "indices", about);
  require(values.equals(want_values), "values", about);
  require(v.equals(want_v), "v", about);
  require(u.equals(want_u), "u", about);
  require(grad.equals(grad_before), "grad is only read", about);

  Workspace w;
  lay_out(w, workspace.get(), rows.state_numel, rows.num, rows.count);
  for (int32_t slot = 0; rows.num && slot < w.header->num_large; ++slot) {
    const Segment& segment = w.segments[slot];
    if (segment.k == 0) continue;
    const int32_t total = w.num_candidates[slot];
    ++(total >= segment.k && total <= segment.candidate_capacity ? num_from_candidates : num_from_all);
  }
}

Rows one(int64_t n, int64_t k) { return {{0, n, k}, 1, n, n, k}; }

void check_random_sparsify(int64_t most_elements) {
  const DType grads[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  const DType states[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  const auto update = static_cast<Update>(uniform(0, 3));
  const int kind = static_cast<int>(uniform(0, kNumKinds - 1));
  const DType state = update == Update::kNone ? states[uniform(0, 2)] : states[uniform(0, 1)];
  if (update != Update::kNone && chance(0.5)) {
    return check_sparsify(random_rows(uniform(1, 12), most_elements / 4), true, update, grads[uniform(0, 2)], state,
                          kind);
  }
  const int64_t n = random_numel(most_elements);
  check_sparsify(one(n, random_k(n)), false, update, grads[uniform(0, 2)], state, kind);
}

// Other values exactly where the sample is drawn: the bound is then far too high, or far too low.
void check_misleading_sample(float factor) {
  const int64_t n = 4 * kSmall + 77, k = n / 200;
  Array v(DType::kFloat32, n), values(DType::kFloat32, k);
  fill(v, 0);
  const int64_t size = sample_size(n, k);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t at = sample_position(i, n / size);
    v.set(at, v.get(at) * factor);
  }
  std::vector<int32_t> keys(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = cpu::key_of(v.get(i));
  const std::vector<int64_t> want = largest(keys, k);
  std::unique_ptr<int32_t[]> indices(new int32_t[k]);
  std::unique_ptr<char[]> workspace(new char[sparsify_workspace_bytes(n, 1, k)]);
  const Sparsify job{
      Update::kNone, DType::kFloat32, DType::kFloat32, nullptr,      n, nullptr, v.data(), n, nullptr, 1, k,
      0.0f,          false,           values.data(),   indices.get()};
  sparsify(job, workspace.get(), nullptr);
  require(std::equal(want.begin(), want.end(), indices.get()), "a sample that misleads", std::to_string(factor));
}

void check_bad_table(std::vector<int64_t> table, int64_t grad_numel, int64_t state_numel, int64_t count) {
  Array grad(DType::kFloat32, grad_numel), v(DType::kFloat32, state_numel), values(DType::kFloat32, count);
  fill(grad, 0);
  fill(v, 0);
  std::unique_ptr<int32_t[]> indices(new int32_t[count]);
  const auto num = static_cast<int64_t>(table.size() / 3);
  std::unique_ptr<char[]> workspace(new char[sparsify_workspace_bytes(state_numel, num, count)]);
  memset(workspace.get(), 0x77, sparsify_workspace_bytes(state_numel, num, count));
  const Sparsify job{Update::kAccumulate,
                     DType::kFloat32,
                     DType::kFloat32,
                     grad.data(),
                     grad_numel,
                     nullptr,
                     v.data(),
                     state_numel,
                     table.data(),
                     num,
                     count,
                     0.0f,
                     true,
                     values.data(),
                     indices.get()};
  sparsify(job, workspace.get(), nullptr);
  std::unique_ptr<int32_t> errors(new int32_t(7));
  take_table_errors(errors.get(), nullptr);
  require(*errors == 1, "a table that contradicts itself is counted", std::to_string(num));
  take_table_errors(errors.get(), nullptr);
  require(*errors == 0, "taking errors sets them back", "");
}

void check_bad_tables() {
  const int64_t n = 5 * kTile, huge = INT64_MAX;
  check_bad_table({0, n, 5, n - 1, n, 5}, 2 * n, 2 * n, 10);      // overlap
  check_bad_table({n, n, 5, 0, n, 5}, 2 * n, 2 * n, 10);          // descending
  check_bad_table({0, n, 5, n, n + 1, 5}, 2 * n, 2 * n + 1, 10);  // beyond grad
  check_bad_table({0, n, n + 1}, n, n, n + 1);                    // k
  check_bad_table({0, n, -1, n, n, 2}, 2 * n, 2 * n, 1);
  check_bad_table({0, n, 5, n, n, 5}, 2 * n, 2 * n - 1, 10);                  // states too short
  check_bad_table({0, n, 5, n, n, 5}, 2 * n, 2 * n + 1, 10);                  // and too long
  check_bad_table({0, n, 5, n, n, 5}, 2 * n, 2 * n, 9);                       // results too short
  check_bad_table({0, n, 5, n, n, 5}, 2 * n, 2 * n, 11);                      // and too long
  check_bad_table({0, n, 5, n, 100, 5, n + 100, 1, 0}, n + 101, n + 50, 10);  // a small one before the last leaves v
  check_bad_table({0, 100, 5, 100, 100, 5, 200, 1, 0}, 201, 201, 7);          // or the result
  check_bad_table({-1, n, 5}, n, n, 5);
  check_bad_table({0, huge, 5, huge, huge, huge}, n, n, 5);
  check_bad_table({huge, huge, huge, -huge, -huge, -huge, 0, n, 5}, n, n, 5);
}

void check_interleaved(int64_t n, int64_t k, int64_t owners, DType dtype, int kind) {
  Array x(dtype, n, chance(0.3) ? uniform(1, 3) : 0), values(dtype, owners * k), want_values(dtype, owners * k);
  fill(x, kind);
  std::vector<int32_t> want(owners * k);
  for (int64_t owner = 0; owner < owners; ++owner) {
    std::vector<int32_t> keys;
    for (int64_t i = owner; i < n; i += owners) keys.push_back(cpu::key_of(x.get(i)));
    int64_t at = owner * k;
    for (const int64_t i : largest(keys, k)) {
      want[at] = static_cast<int32_t>(i);
      memcpy(want_values.data() + at++ * x.width(), x.data() + (owner + i * owners) * x.width(), x.width());
    }
  }
  std::unique_ptr<int32_t[]> indices(new int32_t[owners * k]);
  const size_t bytes = interleaved_workspace_bytes(n, k, owners);
  std::unique_ptr<char[]> workspace(new char[bytes]);
  memset(workspace.get(), 0x77, bytes);
  topk_abs_interleaved(dtype, x.data(), n, k, owners, values.data(), indices.get(), workspace.get(), nullptr);
  const std::string about = std::string(kKinds[kind]) + ", " + std::to_string(n) + " elements, " +
                            std::to_string(owners) + " owners, k " + std::to_string(k);
  require(std::equal(want.begin(), want.end(), indices.get()), "interleaved indices", about);
  require(values.equals(want_values), "interleaved values", about);
}

void check_random_interleaved(int64_t most_elements) {
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  const int64_t n = random_numel(most_elements);
  const int64_t owners = chance(0.2) ? uniform(1, 90) : uniform(1, 9);
  const int64_t per_owner = n / owners;
  const double part = chance(0.7) ? 0.004 : 0.2;
  const int64_t k =
      chance(0.2) ? per_owner : least(per_owner, static_cast<int64_t>(static_cast<double>(per_owner) * part) + 1);
  check_interleaved(n, k, owners, dtypes[uniform(0, 2)], static_cast<int>(uniform(0, kNumKinds - 1)));
}

template <class Out, class Value>
void check_scatter(DType out_dtype, DType value_dtype, Value (*make)(float)) {
  const int64_t n = uniform(1, 3000), count = uniform(0, n);
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), generator);
  std::unique_ptr<Out[]> out(new Out[n]);
  std::unique_ptr<int32_t[]> indices(new int32_t[count]);
  std::unique_ptr<Value[]> values(new Value[count]);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Out>(normal(generator) * 1e-38f);
  std::vector<Out> want(out.get(), out.get() + n);
  const int32_t bad[] = {-1, static_cast<int32_t>(n), INT32_MAX, INT32_MIN};
  int32_t num_bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = make(normal(generator) * 1e-38f);
    indices[i] = order[i];
    if (chance(0.02)) {
      indices[i] = bad[uniform(0, 3)];
      ++num_bad;
    } else if constexpr (sizeof(Value) == 2) {
      want[order[i]] += static_cast<Out>(cpu::load(&values[i]));
    } else {
      want[order[i]] += static_cast<Out>(values[i]);
    }
  }
  scatter_add(out_dtype, out.get(), n, indices.get(), value_dtype, values.get(), count, nullptr);
  require(memcmp(out.get(), want.data(), n * sizeof(Out)) == 0, "scatter_add", std::to_string(n));
  std::unique_ptr<int32_t> errors(new int32_t(7));
  take_index_errors(errors.get(), nullptr);
  require(*errors == num_bad, "indices out of range are counted", std::to_string(num_bad));
}

void check_finite(DType dtype) {
  const int64_t n = uniform(0, 70000);
  Array x(dtype, n);
  for (int64_t i = 0; i < n; ++i) x.set(i, 1.0f + static_cast<float>(i % 7));
  std::unique_ptr<bool> result(new bool(false));
  all_finite(dtype, x.data(), n, result.get(), nullptr);
  require(*result, "finite", std::to_string(n));
  if (n == 0) return;
  x.set(uniform(0, n - 1), chance(0.5) ? std::nanf("") : -INFINITY);
  all_finite(dtype, x.data(), n, result.get(), nullptr);
  require(!*result, "not finite", std::to_string(n));
}

void check_conversions() {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const auto word = static_cast<uint16_t>(bits);
    const cpu::Float16 half{word};
    const cpu::BFloat16 brain{word};
    require(cpu::to_bits(cpu::load(&half)) == to_bits(widen(Float16{word})), "float16", std::to_string(bits));
    require(cpu::to_bits(cpu::load(&brain)) == to_bits(widen(BFloat16{word})), "bfloat16", std::to_string(bits));
    cpu::BFloat16 stored;
    const float x = from_bits(bits << 16 | static_cast<uint32_t>(uniform(0, 0xffff)));
    cpu::store(&stored, x);
    require(stored.bits == narrow<BFloat16>(x).bits, "rounding to bfloat16", std::to_string(bits));
    require(cpu::key_of(x) == key_of(x), "key", std::to_string(bits));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 100;
  generator.seed(argc > 2 ? atoll(argv[2]) : 1);
  const int64_t most_elements = most(12 * kTile, 8 * kSmall);
  check_conversions();
  check_bad_tables();
  check_misleading_sample(100);
  check_misleading_sample(1e-3f);
  check_interleaved(40 * kTile, 5, 32, DType::kFloat32, 12);  // one owner has more than its list takes, the others less
  for (int i = 0; i < rounds; ++i) {
    check_random_sparsify(most_elements);
    check_random_interleaved(most_elements);
    check_scatter<float, float>(DType::kFloat32, DType::kFloat32, [](float x) { return x; });
    check_scatter<float, cpu::BFloat16>(DType::kFloat32, DType::kBFloat16, [](float x) {
      cpu::BFloat16 rounded;
      cpu::store(&rounded, x);
      return rounded;
    });
    check_scatter<double, double>(DType::kFloat64, DType::kFloat64, [](float x) { return static_cast<double>(x); });
    const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    check_finite(dtypes[uniform(0, 2)]);
  }
  printf("%d checks passed; large segments selected from candidates: %d, from all their elements: %d\n", num_checks,
         num_from_candidates, num_from_all);
  require(num_from_candidates > 0 && num_from_all > 0, "both ways were taken", "");
  return 0;
}
