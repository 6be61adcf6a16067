// Index spaces of tensors of several strides, in as few dimensions as all of them allow.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace maskops {

// The innermost dimension first, by the strides of the first tensor.
template <int count>
struct Layout {
  int dimensions = 1;
  int64_t sizes[most_dimensions] = {1};
  int64_t strides[count][most_dimensions] = {};
};

// The tensors have the sizes of the first, or 1 where they are repeated; those that are missing have no strides.
template <int count>
Layout<count> collapse(const View* const (&views)[count]) {
  const View& first = *views[0];
  int order[most_dimensions], used = 0;
  for (int d = 0; d < first.dimensions; ++d) {
    if (first.sizes[d] != 1) order[used++] = d;
  }
  std::stable_sort(order, order + used, [&](int a, int b) {
    return first.strides[a] != first.strides[b] ? first.strides[a] < first.strides[b] : first.sizes[a] < first.sizes[b];
  });
  const auto stride = [&](int i, int d) {
    const View& view = *views[i];
    const int at = d - first.dimensions + view.dimensions;
    return !view || at < 0 || view.sizes[at] == 1 ? 0 : view.strides[at];
  };
  Layout<count> layout;
  int last = -1;
  for (int o = 0; o < used; ++o) {
    const int d = order[o];
    bool joins = last >= 0;
    for (int i = 0; joins && i < count; ++i) {
      joins = stride(i, d) == layout.strides[i][last] * layout.sizes[last];
    }
    if (joins) {
      layout.sizes[last] *= first.sizes[d];
    } else {
      layout.sizes[++last] = first.sizes[d];
      for (int i = 0; i < count; ++i) layout.strides[i][last] = stride(i, d);
    }
  }
  layout.dimensions = std::max(last + 1, 1);
  return layout;
}

// The factor with the sizes of the whole, and strides of 0 where it is repeated.
inline View repeated_as(const View& factor, const View& whole) {
  View view = whole;
  view.data = factor.data;
  view.dtype = factor.dtype;
  for (int d = 0; d < whole.dimensions; ++d) {
    const int at = d - whole.dimensions + factor.dimensions;
    view.strides[d] = at < 0 || factor.sizes[at] != whole.sizes[d] ? 0 : factor.strides[at];
  }
  return view;
}

// The dimensions in which the factor is repeated, or the others, of a tensor that has all of them.
inline View part(const View& whole, const View& factor, bool repeated) {
  View view = whole;
  view.dimensions = 0;
  for (int d = 0; d < whole.dimensions; ++d) {
    const int at = d - whole.dimensions + factor.dimensions;
    if ((at < 0 || factor.sizes[at] != whole.sizes[d]) != repeated) continue;
    view.sizes[view.dimensions] = whole.sizes[d];
    view.strides[view.dimensions++] = whole.strides[d];
  }
  return view;
}

}  // namespace maskops
