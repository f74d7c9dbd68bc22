// Adapters: their many small arrays, in float32, in few launches.
//
// Which of the arrays a thread is in, it finds by comparing: a list of them, indexed, would be copied by every thread.

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

// From here on sixteen arrays, of n0, n1, ... numbers each.
#define EACH(what) \
    what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7) \
    what(8) what(9) what(10) what(11) what(12) what(13) what(14) what(15)
#define SIZE(k) int n##k,
#define INPUT(k) const float *x##k,

// They behind each other.
#define FIND(k) \
    if (!x && i < n##k) { \
        x = x##k; \
    } else if (!x) { \
        i -= n##k; \
    }
extern "C" __global__ void join(EACH(INPUT) float* out, EACH(SIZE) int size) {
    int i = thread(), to = i;
    const float* x = nullptr;
    if (i < size) {
        EACH(FIND)
        out[to] = x[i];
    }
}
#undef FIND

#define GRADIENT(k) const float *g##k,
#define PARAMETER(k) const float *p##k,
#define FIRST(k) const float *m##k,
#define SECOND(k) const float *v##k,
#define NEW_PARAMETER(k) float *new_p##k,
#define NEW_FIRST(k) float *new_m##k,
#define NEW_SECOND(k) float *new_v##k,
#define FIND(k) \
    if (!g && i < n##k) { \
        g = g##k, p = p##k, m = m##k, v = v##k, new_p = new_p##k, new_m = new_m##k, new_v = new_v##k; \
    } else if (!g) { \
        i -= n##k; \
    }

// AdamW, as in optim.py, where `accepted`; else nothing changes. `rest1` is 1 - b1, which float32 would have off by 1e-5.
extern "C" __global__ void adamw(
    EACH(GRADIENT) EACH(PARAMETER) EACH(FIRST) EACH(SECOND)
    const float* kept, const float* rate, const float* epsilon, const bool* accepted,
    EACH(NEW_PARAMETER) EACH(NEW_FIRST) EACH(NEW_SECOND)
    EACH(SIZE) int size, float b1, float rest1, float b2, float rest2
) {
    int i = thread();
    if (i >= size) {
        return;
    }
    const float *g = nullptr, *p, *m, *v;
    float *new_p, *new_m, *new_v;
    EACH(FIND)
    float gradient = g[i], parameter = p[i], first = m[i], second = v[i];
    if (*accepted) {
        first = b1 * first + rest1 * gradient;
        second = b2 * second + rest2 * gradient * gradient;
        parameter = *kept * parameter - *rate * first / (sqrtf(second) + *epsilon);
    }
    new_p[i] = parameter, new_m[i] = first, new_v[i] = second;
}
