// kernels.py's `advance` and `move` for the host: many tensors in one call, each element read and written once.
// The work is cut into chunks of a fixed size, so that no sum depends on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t CHUNK = 16384;  // elements that one thread takes at a time
constexpr int64_t RUN = 1024;     // of them summed in the moments' precision before they join a double

enum Score { NONE = 0, EPD = 1, PFN = 2 };

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float* at, float x, uint32_t) { *at = x; }
inline void store(double* at, double x, uint32_t) { *at = x; }
// Rounded stochastically by a hash of seed and position: the same noise as kernels.round_stochastically.
inline void store(bfloat16* at, float x, uint32_t noise) {
    noise = (noise ^ (noise >> 16)) * 0x21F0AAADu;
    noise = (noise ^ (noise >> 15)) * 0x735A2D97u;
    noise ^= noise >> 15;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    // Noise would carry some NaNs over to -0.
    bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    at->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + (noise & 0xFFFFu)) >> 16);
}

// Where each chunk of a list of tensors lies.
struct Chunk {
    int64_t tensor, start, stop;
};

std::vector<Chunk> cut(int64_t count, const int64_t* sizes) {
    std::vector<Chunk> chunks;
    for (int64_t t = 0; t < count; ++t)
        for (int64_t start = 0; start < sizes[t]; start += CHUNK)
            chunks.push_back({t, start, start + CHUNK < sizes[t] ? start + CHUNK : sizes[t]});
    return chunks;
}

template <int score, typename G, typename S>
S run(const G* __restrict g, S* __restrict m, S* __restrict v, int64_t n, S w1, S b2, S w2, S eps) {
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
        S x = widen(g[i]);
        S first = m[i] + (x - m[i]) * w1;
        S second = v[i] * b2 + x * x * w2;
        m[i] = first;
        v[i] = second;
        if (score != NONE) {
            S ratio = first / (std::sqrt(second) + eps);
            sum += (score == EPD ? first : ratio) * ratio;
        }
    }
    return sum;
}

template <int score, typename G, typename S>
void advance(int64_t count, const int64_t* sizes, const G* const* g, S* const* m, S* const* v, double beta1,
             double beta2, double eps, double* sums, int threads) {
    std::vector<Chunk> chunks = cut(count, sizes);
    std::vector<double> partial(chunks.size());
    int64_t total = static_cast<int64_t>(chunks.size());
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < total; ++c) {
        Chunk at = chunks[c];
        double sum = 0;
        for (int64_t i = at.start; i < at.stop; i += RUN)
            sum += run<score>(g[at.tensor] + i, m[at.tensor] + i, v[at.tensor] + i, at.stop - i < RUN ? at.stop - i : RUN,
                              S(1 - beta1), S(beta2), S(1 - beta2), S(eps));
        partial[c] = sum;
    }
    for (int64_t t = 0; t < count; ++t) sums[t] = 0;
    for (int64_t c = 0; c < total; ++c) sums[chunks[c].tensor] += partial[c];
}

template <typename G, typename S>
void advance_scored(int64_t count, const int64_t* sizes, void* const* g, void* const* m, void* const* v, double beta1,
                    double beta2, double eps, int score, double* sums, int threads) {
    auto call = score == EPD ? advance<EPD, G, S> : score == PFN ? advance<PFN, G, S> : advance<NONE, G, S>;
    call(count, sizes, reinterpret_cast<const G* const*>(g), reinterpret_cast<S* const*>(m),
         reinterpret_cast<S* const*>(v), beta1, beta2, eps, sums, threads);
}

template <typename P, typename S>
void move(int64_t count, const int64_t* sizes, void* const* p, void* const* m, void* const* v, const double* keeps,
          const double* rates, const double* roots, double eps, const uint32_t* seeds, int threads) {
    std::vector<Chunk> chunks = cut(count, sizes);
    int64_t total = static_cast<int64_t>(chunks.size());
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < total; ++c) {
        Chunk at = chunks[c];
        P* __restrict weight = static_cast<P*>(p[at.tensor]);
        const S* __restrict first = static_cast<const S*>(m[at.tensor]);
        const S* __restrict second = static_cast<const S*>(v[at.tensor]);
        S keep = S(keeps[at.tensor]), rate = S(rates[at.tensor]), root = S(roots[at.tensor]), e = S(eps);
        uint32_t seed = seeds[at.tensor];
#pragma omp simd
        for (int64_t i = at.start; i < at.stop; ++i) {
            S x = widen(weight[i]) * keep - rate * (first[i] / (std::sqrt(second[i]) * root + e));
            store(weight + i, x, static_cast<uint32_t>(i) + seed);
        }
    }
}

}  // namespace

// `kind`: 0 float32 throughout, 1 float64 throughout, 2 bfloat16 weights and gradients with float32 moments.
extern "C" void molf_advance(int kind, int64_t count, const int64_t* sizes, void* const* g, void* const* m,
                             void* const* v, double beta1, double beta2, double eps, int score, double* sums,
                             int threads) {
    auto call = kind == 0 ? advance_scored<float, float>
                          : kind == 1 ? advance_scored<double, double> : advance_scored<bfloat16, float>;
    call(count, sizes, g, m, v, beta1, beta2, eps, score, sums, threads);
}

extern "C" void molf_move(int kind, int64_t count, const int64_t* sizes, void* const* p, void* const* m, void* const* v,
                          const double* keeps, const double* rates, const double* roots, double eps,
                          const uint32_t* seeds, int threads) {
    auto call = kind == 0 ? move<float, float> : kind == 1 ? move<double, double> : move<bfloat16, float>;
    call(count, sizes, p, m, v, keeps, rates, roots, eps, seeds, threads);
}
