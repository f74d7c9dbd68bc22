// Rows that go elsewhere, whose widths are multiples of VECTOR.

// Row i of `out` (rows, vectors) is row index[i] of x.
extern "C" __global__ void take_rows(const T* x, const int* index, T* out, int rows, int vectors) {
    unsigned i = thread(), row = i / vectors, vector = i % vectors;
    if (row < rows) {
        store(out, i, load(x, (unsigned long long)index[row] * vectors + vector));
    }
}

// Row i of each result is row index[i] of x, its heads rotated by the angles of a place in a row of `length` tokens: to
// rows, by that of i, and back, which is the gradient, by that of index[i] and the other way. Values are not rotated.
// `cosines` are (length, d / 2), `sines` (length, 2, d / 2), of which the second row counts.
extern "C" __global__ void take_heads(
    const T* queries, const T* keys, const T* values, const int* index, const float* cosines, const float* sines,
    T* to_queries, T* to_keys, T* to_values, int rows, int length, int heads, int kv_heads, int half, bool back
) {
    unsigned vectors = half / VECTOR, heads_of_all = heads + 2 * kv_heads;
    unsigned i = thread(), vector = i % vectors, head = i / vectors % heads_of_all, row = i / vectors / heads_of_all;
    if (row >= rows) {
        return;
    }
    unsigned from = index[row], place = (back ? from : row) % length;
    const T* x = queries;
    T* to = to_queries;
    unsigned count = heads, own = head;
    bool rotates = true;
    if (head >= heads + kv_heads) {
        x = values, to = to_values, count = kv_heads, own = head - heads - kv_heads, rotates = false;
    } else if (head >= heads) {
        x = keys, to = to_keys, count = kv_heads, own = head - heads;
    }
    unsigned long long source = ((unsigned long long)from * count + own) * 2 * vectors + vector;
    unsigned long long target = ((unsigned long long)row * count + own) * 2 * vectors + vector;
    Vector first = load(x, source), second = load(x, source + vectors);
    if (rotates) {
        const float* cosine = cosines + (unsigned long long)place * half + vector * VECTOR;
        const float* sine = sines + ((unsigned long long)place * 2 + 1) * half + vector * VECTOR;
        for (int n = 0; n < VECTOR; ++n) {
            float a = wide(first.of[n]), b = wide(second.of[n]), c = cosine[n], s = back ? -sine[n] : sine[n];
            narrow(a * c - b * s, first.of[n]);
            narrow(a * s + b * c, second.of[n]);
        }
    }
    store(to, target, first);
    store(to, target + vectors, second);
}
