// Adapters that see the same input, beside each other.

struct Place {
    int part, row, column;
};

// Where element i of an array (rows, the sum of four widths) stands among parts (rows, width).
__device__ inline Place place(int i, int c0, int c1, int c2, int c3) {
    int all = c0 + c1 + c2 + c3, row = i / all, column = i % all;
    if (column < c0) return {0, row, column};
    column -= c0;
    if (column < c1) return {1, row, column};
    column -= c1;
    if (column < c2) return {2, row, column};
    return {3, row, column - c2};
}

// The parts beside each other, times `scale`.
extern "C" __global__ void join_columns(
    const float* x0, const float* x1, const float* x2, const float* x3, T* out,
    int size, int c0, int c1, int c2, int c3, float scale
) {
    int i = thread();
    if (i < size) {
        Place at = place(i, c0, c1, c2, c3);
        const float* x = at.part == 0 ? x0 : at.part == 1 ? x1 : at.part == 2 ? x2 : x3;
        int width = at.part == 0 ? c0 : at.part == 1 ? c1 : at.part == 2 ? c2 : c3;
        narrow(x[at.row * width + at.column] * scale, out[i]);
    }
}

// The other way round.
extern "C" __global__ void split_columns(
    const T* x, float* out0, float* out1, float* out2, float* out3,
    int size, int c0, int c1, int c2, int c3, float scale
) {
    int i = thread();
    if (i < size) {
        Place at = place(i, c0, c1, c2, c3);
        float* out = at.part == 0 ? out0 : at.part == 1 ? out1 : at.part == 2 ? out2 : out3;
        int width = at.part == 0 ? c0 : at.part == 1 ? c1 : at.part == 2 ? c2 : c3;
        out[at.row * width + at.column] = wide(x[i]) * scale;
    }
}
