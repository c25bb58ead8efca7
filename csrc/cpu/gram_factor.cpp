// Pivoted Cholesky of Gram matrices, step by step as on the device (csrc/cuda/gram_factor.cu).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/checks.h"
#include "../common/isa.h"

namespace loraforge {
namespace {

// x -= factor * y
LF_CLONES void subtract(double* x, const double* y, double factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    x[i] -= factor * y[i];
  }
}

struct Columns {
  std::vector<double> norm, inverse, left;
  std::vector<int64_t> pivot;

  // False where G is not finite.
  bool take(const double* G, int64_t R) {
    norm.assign(R, 0.0), inverse.assign(R, 0.0), left.assign(R, 0.0);
    pivot.clear();
    bool finite = true;
    for (int64_t j = 0; j < R; ++j) {
      const double square = G[j * R + j];
      finite = finite && std::isfinite(square);
      if (square > 0.0) {
        norm[j] = std::sqrt(square), inverse[j] = 1.0 / norm[j], left[j] = 1.0;
      }
    }
    return finite;
  }
};

// Rows of the triangle into F until what is left of every column is at most `cut`.
void triangulate(const double* G, int64_t R, double cut, Columns& columns, double* F) {
  for (int64_t step = 0; step < R; ++step) {
    const int64_t pivot = std::max_element(columns.left.begin(), columns.left.end()) - columns.left.begin();
    const double most = columns.left[pivot];
    if (!(most > cut)) {
      return;
    }
    double* row = F + step * R;
    for (int64_t j = 0; j < R; ++j) {
      row[j] = G[pivot * R + j] * columns.inverse[pivot] * columns.inverse[j];
    }
    for (int64_t i = 0; i < step; ++i) {
      subtract(row, F + i * R, F[i * R + pivot], R);
    }
    const double root = std::sqrt(most);
    for (int64_t j = 0; j < R; ++j) {
      double& left = columns.left[j];
      row[j] = j == pivot ? root : left < 0.0 ? 0.0 : row[j] / root;
      left = j == pivot || left < 0.0 ? -1.0 : std::max(left - row[j] * row[j], 0.0);
    }
    columns.pivot.push_back(pivot);
  }
}

// The inverse of F's pivot columns, row by row from the last, into X (rank, R); its squared Frobenius norm.
double invert(const double* F, int64_t R, const std::vector<int64_t>& pivot, double* X) {
  const int64_t rank = static_cast<int64_t>(pivot.size());
  double squares = 0.0;
  for (int64_t i = rank - 1; i >= 0; --i) {
    double* x = X + i * R;
    std::fill(x, x + R, 0.0);
    x[i] = 1.0;
    for (int64_t l = i + 1; l < rank; ++l) {
      subtract(x + l, X + l * R + l, F[i * R + pivot[l]], rank - l);
    }
    for (int64_t j = i; j < rank; ++j) {
      x[j] /= F[i * R + pivot[i]];
      squares += x[j] * x[j];
    }
  }
  return squares;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gram_factor(const Tensor& G, double cut) {
  check_dim("gram_factor", "G", G, 3, "(b, R, R)");
  check_dtype("gram_factor", "G", G, {ScalarType::Double});
  const int64_t b = G.size(0), R = G.size(1);
  check_size("gram_factor", "G", G, 2, R, "R");
  const Tensor grams = torch::stable::contiguous(G);
  Tensor triangle = torch::stable::new_zeros(G, {b, R, R}), solve = torch::stable::new_zeros(G, {b, R, R});
  Tensor ranks = torch::stable::new_zeros(G, {b}, ScalarType::Long), condition = torch::stable::new_empty(G, {b});
  Columns columns;
  std::vector<double> F(R * R), X(R * R);
  for (int64_t at = 0; at < b; ++at) {
    const double* gram = grams.const_data_ptr<double>() + at * R * R;
    double* upper = triangle.mutable_data_ptr<double>() + at * R * R;
    double* inverse = solve.mutable_data_ptr<double>() + at * R * R;
    double& found = condition.mutable_data_ptr<double>()[at];
    if (!columns.take(gram, R)) {
      found = std::numeric_limits<double>::quiet_NaN();
      std::fill(upper, upper + R * R, found);
      std::fill(inverse, inverse + R * R, found);
      continue;
    }
    triangulate(gram, R, cut, columns, F.data());
    const int64_t rank = static_cast<int64_t>(columns.pivot.size());
    const double squares = invert(F.data(), R, columns.pivot, X.data());
    for (int64_t i = 0; i < rank; ++i) {
      const int64_t column = columns.pivot[i];
      for (int64_t j = 0; j < R; ++j) {
        upper[i * R + j] = F[i * R + j] * columns.norm[j];
        inverse[column * R + j] = j < rank ? X[i * R + j] * columns.inverse[column] : 0.0;
      }
    }
    ranks.mutable_data_ptr<int64_t>()[at] = rank;
    found = rank == 0 ? 1.0 : std::sqrt(squares / static_cast<double>(rank));
  }
  return {triangle, solve, ranks, condition};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(loraforge, CPU, m) {
  m.impl("gram_factor", TORCH_BOX(&gram_factor));
}

} // namespace loraforge
