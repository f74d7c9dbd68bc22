// Sixteen float32 arrays at once, of n0, n1, ... numbers each.
//
// Which of them a thread is in, it finds by comparing: a list of them, indexed, would be copied by every thread.

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
