// SwiGLU of arrays whose sizes are multiples of VECTOR.

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// silu(gate) * up.
extern "C" __global__ void swiglu(const T* gate, const T* up, T* out, unsigned vectors) {
    unsigned i = thread();
    if (i < vectors) {
        Vector g = load(gate, i), u = load(up, i);
        for (int n = 0; n < VECTOR; ++n) {
            float x = wide(g.of[n]);
            narrow(x * sigmoid(x) * wide(u.of[n]), g.of[n]);
        }
        store(out, i, g);
    }
}

// Its gradient towards both.
extern "C" __global__ void swiglu_gradient(
    const T* gate, const T* up, const T* cotangent, T* to_gate, T* to_up, unsigned vectors
) {
    unsigned i = thread();
    if (i < vectors) {
        Vector g = load(gate, i), u = load(up, i), c = load(cotangent, i);
        for (int n = 0; n < VECTOR; ++n) {
            float x = wide(g.of[n]), s = sigmoid(x), dy = wide(c.of[n]);
            narrow(dy * wide(u.of[n]) * s * (1.0f + x * (1.0f - s)), g.of[n]);
            narrow(dy * x * s, u.of[n]);
        }
        store(to_gate, i, g);
        store(to_up, i, u);
    }
}
