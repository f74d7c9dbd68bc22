// What all kernels here share. Nothing else is included, so that compiling takes a tenth of a second.

struct bfloat16 {
    unsigned short bits;
};
struct float16 {
    unsigned short bits;
};

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline void narrow(float x, float& result) { result = x; }
__device__ inline void narrow(float x, bfloat16& result) {
    unsigned bits = __float_as_uint(x);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    result.bits = nan ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
}
#ifdef __CUDACC_RTC__
__device__ inline float wide(float16 x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
}
__device__ inline void narrow(float x, float16& result) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x)); }
#endif

using T = NUMBER;  // one of the three; kernels compute in float32, and what is stored is rounded once
constexpr int VECTOR = 16 / sizeof(T);  // numbers that are moved at once

struct alignas(16) Vector {
    T of[VECTOR];
};

__device__ inline Vector load(const T* from, unsigned long long vector) {
    return reinterpret_cast<const Vector*>(from)[vector];
}
__device__ inline void store(T* to, unsigned long long vector, const Vector& values) {
    reinterpret_cast<Vector*>(to)[vector] = values;
}
__device__ inline unsigned thread() { return blockIdx.x * blockDim.x + threadIdx.x; }
