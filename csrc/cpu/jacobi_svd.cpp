// jacobi_svd: pivoted QR and one-sided Jacobi in double, step by step as on the device (csrc/cuda/jacobi_svd.cu).
#include "../common/jacobi.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/checks.h"
#include "../common/isa.h"

namespace loraforge {
namespace {

LF_CLONES double dot(const double* x, const double* y, int64_t count) {
  DoubleLanes sums = {}, a, b;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    load_lanes(x + i, a);
    load_lanes(y + i, b);
    sums += a * b;
  }
  double rest = 0.0;
  for (; i < count; ++i) {
    rest += x[i] * y[i];
  }
  return sum_lanes(sums) + rest;
}

LF_CLONES void subtract(double* x, const double* y, double factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    x[i] -= factor * y[i];
  }
}

LF_CLONES void rotate(double* x, double* y, const Rotation& turn, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double a = x[i], b = y[i];
    x[i] = a + turn.s * (b - turn.tau * a);
    y[i] = b - turn.s * (a + turn.tau * b);
  }
}

// One matrix at a time; columns of `rows` entries.
struct Jacobi {
  int64_t rows, n;
  std::vector<double> A, V, X, w, head, coef;
  std::vector<int64_t> order, from;

  Jacobi(int64_t rows, int64_t n)
      : rows(rows), n(n), A(rows * n), V(rows * n), X(n * n), w(n), head(n), coef(n), order(n), from(n) {}

  double* column(int64_t j) {
    return A.data() + j * rows;
  }

  // Reflector i is I - coef v v^T, v = (head_i, column order[i] below row i); R^T goes to X. Returns their number.
  int64_t pivoted_qr() {
    std::fill(X.begin(), X.end(), 0.0);
    for (int64_t j = 0; j < n; ++j) {
      w[j] = dot(column(j), column(j), rows);
    }
    int64_t rank = 0;
    for (; rank < n; ++rank) {
      const int64_t pivot = std::max_element(w.begin(), w.end()) - w.begin();
      if (!(w[pivot] > kNothing)) {
        break;
      }
      const double* v = column(pivot) + rank;
      const double size = std::sqrt(w[pivot]), beta = v[0] > 0.0 ? -size : size;
      order[rank] = pivot, head[rank] = v[0] - beta, coef[rank] = 1.0 / (size * (size + std::fabs(v[0])));
      w[pivot] = -1.0;
      X[rank * n + rank] = beta;
      const int64_t below = rows - rank - 1;
      for (int64_t j = 0; j < n; ++j) {
        if (w[j] >= 0.0) {
          double* a = column(j) + rank;
          const double part = coef[rank] * (head[rank] * a[0] + dot(v + 1, a + 1, below));
          a[0] -= part * head[rank];
          subtract(a + 1, v + 1, part, below);
          w[j] = dot(a + 1, a + 1, below);
        }
      }
    }
    for (int64_t j = 0, at = rank; j < n; ++j) {
      if (w[j] >= 0.0) {
        order[at++] = j;
      }
    }
    for (int64_t j = 0; j < rank; ++j) {
      for (int64_t i = j + 1; i < n; ++i) {
        X[j * n + i] = column(order[i])[j];
      }
    }
    return rank;
  }

  int sweep_all(int most, double tolerance) {
    std::fill(V.begin(), V.end(), 0.0);
    for (int64_t j = 0; j < n; ++j) {
      V[j * rows + j] = 1.0;
    }
    const int slots = static_cast<int>(n + n % 2);
    for (int sweep = 1; sweep <= most; ++sweep) {
      for (int64_t j = 0; j < n; ++j) {
        w[j] = dot(&X[j * n], &X[j * n], n);
      }
      bool turned = false;
      for (int pair = 0; pair < (slots - 1) * (slots / 2); ++pair) {
        int p, q;
        pair_of(slots, pair / (slots / 2), pair % (slots / 2), p, q);
        if (p >= n || q >= n) {
          continue;
        }
        if (w[p] < w[q]) {
          std::swap(p, q);
        }
        double *x = &X[p * n], *y = &X[q * n];
        if (!(w[q] > kNothing)) {
          continue;
        }
        const double product = dot(x, y, n);
        if (std::fabs(product) > tolerance * std::sqrt(w[p] * w[q])) {
          const Rotation turn = rotation_of(w[p], w[q], product);
          rotate(x, y, turn, n);
          rotate(&V[p * rows], &V[q * rows], turn, n);
          w[p] += turn.shift;
          w[q] = std::max(w[q] - turn.shift, 0.0);
          turned = true;
        }
      }
      if (!turned) {
        return sweep;
      }
    }
    return -1;
  }

  // Columns of X to norm 1, those of norm 0 filled so that all are orthonormal; w is what they measured.
  void finish() {
    std::vector<int64_t> full;
    for (int64_t j = 0; j < n; ++j) {
      const double square = dot(&X[j * n], &X[j * n], n);
      w[j] = square > kNothing ? std::sqrt(square) : 0.0;
    }
    std::iota(from.begin(), from.end(), 0);
    std::stable_sort(from.begin(), from.end(), [&](int64_t a, int64_t b) { return w[a] > w[b]; });
    std::vector<double> open(n, 1.0);
    for (int64_t j : from) {
      double* x = &X[j * n];
      double size = w[j];
      if (size == 0.0) {
        const int64_t unit = std::max_element(open.begin(), open.end()) - open.begin();
        std::fill(x, x + n, 0.0);
        x[unit] = 1.0;
        for (int pass = 0; pass < 2; ++pass) {
          for (int64_t c : full) {
            subtract(x, &X[c * n], dot(x, &X[c * n], n), n);
          }
        }
        size = std::sqrt(dot(x, x, n));
      }
      for (int64_t i = 0; i < n; ++i) {
        x[i] /= size;
        open[i] -= x[i] * x[i];
      }
      full.push_back(j);
    }
  }

  // V <- Q [V; 0].
  void reflect(int64_t rank) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t r = rank - 1; r >= 0; --r) {
        const double* v = column(order[r]) + r;
        double* x = &V[j * rows] + r;
        const double part = coef[r] * (head[r] * x[0] + dot(v + 1, x + 1, rows - r - 1));
        x[0] -= part * head[r];
        subtract(x + 1, v + 1, part, rows - r - 1);
      }
    }
  }

  // Returns what goes into info.
  template <typename T>
  int run(const T* C, bool flipped, int most, T* U, T* S, T* Vh) {
    double top = 0.0;
    bool finite = true;
    for (int64_t e = 0; e < rows * n; ++e) {
      finite = finite && std::isfinite(C[e]);
      top = std::max(top, std::fabs(static_cast<double>(C[e])));
    }
    if (!finite) {
      const T nan = std::numeric_limits<T>::quiet_NaN();
      std::fill(U, U + (flipped ? n * n : rows * n), nan);
      std::fill(S, S + n, nan);
      std::fill(Vh, Vh + (flipped ? rows * n : n * n), nan);
      return -2;
    }
    int exponent = 0;
    if (top > 0.0) {
      std::frexp(top, &exponent);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        A[j * rows + i] = std::scalbn(static_cast<double>(C[flipped ? j * rows + i : i * n + j]), -exponent);
      }
    }
    const int64_t rank = pivoted_qr();
    const int sweeps = sweep_all(most, sizeof(T) == 4 ? kOrthogonal32 : kOrthogonal64);
    finish();
    reflect(rank);
    for (int64_t place = 0; place < n; ++place) {
      const int64_t j = from[place];
      S[place] = static_cast<T>(std::scalbn(w[j], exponent));
      for (int64_t i = 0; i < n; ++i) {
        (flipped ? U[order[i] * n + place] : Vh[place * n + order[i]]) = static_cast<T>(X[j * n + i]);
      }
      for (int64_t i = 0; i < rows; ++i) {
        (flipped ? Vh[place * rows + i] : U[i * n + place]) = static_cast<T>(V[j * rows + i]);
      }
    }
    return sweeps;
  }
};

template <typename T>
void run_all(const Tensor& cores, int64_t sweeps, const Tensor& U, const Tensor& S, const Tensor& Vh, int* info) {
  const int64_t m = cores.size(1), n = cores.size(2), k = S.size(1);
  Jacobi one(std::max(m, n), k);
  for (int64_t at = 0; at < cores.size(0); ++at) {
    info[at] = one.run(
        cores.const_data_ptr<T>() + at * m * n, m < n, static_cast<int>(sweeps), U.mutable_data_ptr<T>() + at * m * k,
        S.mutable_data_ptr<T>() + at * k, Vh.mutable_data_ptr<T>() + at * k * n);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobi_svd(const Tensor& C, int64_t sweeps) {
  check_dim("jacobi_svd", "C", C, 3, "(b, R, R')");
  check_dtype("jacobi_svd", "C", C, {ScalarType::Float, ScalarType::Double});
  const int64_t b = C.size(0), m = C.size(1), n = C.size(2), k = std::min(m, n);
  const Tensor cores = torch::stable::contiguous(C);
  Tensor U = torch::stable::new_empty(C, {b, m, k}), S = torch::stable::new_empty(C, {b, k});
  Tensor Vh = torch::stable::new_empty(C, {b, k, n});
  Tensor info = torch::stable::new_zeros(C, {b}, ScalarType::Int);
  if (b * k > 0) {
    (C.scalar_type() == ScalarType::Float ? run_all<float> : run_all<double>)(
        cores, sweeps, U, S, Vh, info.mutable_data_ptr<int>());
  }
  return {U, S, Vh, info};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("jacobi_svd", TORCH_BOX(&jacobi_svd));
}

} // namespace loraforge
