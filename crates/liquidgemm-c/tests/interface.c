/* Tests of the C interface on the CPU backend. tests/c_program.rs compiles and runs it.
 *
 * Each test names its property, prints it, and ends the program if it does not hold. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "liquidgemm.h"

#define REQUIRE(condition)                                                                        \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, lg_last_error_message()); \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

enum { M = 5, N = 70, K = 192, EXPERTS = 3 };

static float values[EXPERTS][N * K];
static float x[M * K];
static const char *folder;

static void fill(void) {
    for (int e = 0; e < EXPERTS; e++)
        for (int i = 0; i < N * K; i++) values[e][i] = sinf((float)(i + 1000 * e) * 0.37f);
    for (int i = 0; i < M * K; i++) x[i] = cosf((float)i * 0.11f);
}

static lg_weights *quantized(int expert) {
    lg_weights *weights = NULL;
    REQUIRE(lg_weights_quantize(values[expert], LG_TYPE_F32, N, K, 64, &weights) == LG_OK);
    return weights;
}

/* Quantizes x to codes whose rows are `stride` bytes apart. */
static struct lg_quantized quantize(size_t stride) {
    struct lg_input input = {.struct_size = sizeof(input), .m = M, .k = K, .input_type = LG_TYPE_F32, .input = x};
    struct lg_quantized to = {.struct_size = sizeof(to), .m = M, .k = K, .code_stride = stride};
    to.codes = calloc(M, stride ? stride : K);
    to.scales = calloc(M, sizeof(float));
    REQUIRE(lg_cpu_quantize(&input, &to) == LG_OK);
    return to;
}

static void free_quantized(struct lg_quantized *quantized) {
    free(quantized->codes);
    free(quantized->scales);
}

static void saved_weights_come_back_and_their_parts_make_the_same(void) {
    lg_weights *weights = quantized(0), *loaded = NULL, *assembled = NULL, *packed = NULL, *from_device = NULL;
    char path[4096];
    snprintf(path, sizeof(path), "%s/weights.safetensors", folder);
    REQUIRE(lg_weights_save(weights, path) == LG_OK);
    REQUIRE(lg_weights_load(path, &loaded) == LG_OK);
    struct lg_weights_info info = {.struct_size = sizeof(info)};
    REQUIRE(lg_weights_get_info(loaded, &info) == LG_OK);
    REQUIRE(info.n == N && info.k == K && info.group == 64 && info.strips == 2 && info.k_blocks == 3);
    REQUIRE(info.groups == 3 && info.code_bytes == 2 * 3 * 2048 && info.pair_bytes == 2 * 3 * 128);
    REQUIRE(memcmp(lg_weights_codes(weights), lg_weights_codes(loaded), info.code_bytes) == 0);
    REQUIRE(lg_weights_from_parts(lg_weights_codes(weights), info.code_bytes, lg_weights_pairs(weights),
                                  info.pair_bytes, lg_weights_channel_scales(weights), N, K, 64, &assembled) == LG_OK);

    uint8_t *codes = malloc(N * K), *pairs = malloc(N * 3 * 2);
    REQUIRE(lg_weights_unpack(weights, codes, pairs) == LG_OK);
    REQUIRE(lg_weights_pack(codes, pairs, lg_weights_channel_scales(weights), N, K, 64, &packed) == LG_OK);

    size_t bytes = 0;
    REQUIRE(lg_weights_device_size(N, K, 64, &bytes) == LG_OK && bytes == info.device_bytes);
    void *device = malloc(bytes);
    REQUIRE(lg_weights_device_bytes(weights, device, bytes) == LG_OK);
    REQUIRE(lg_weights_device_bytes(weights, device, bytes - 1) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_from_device_bytes(device, bytes, N, K, 64, &from_device) == LG_OK);

    lg_weights *all[] = {loaded, assembled, packed, from_device};
    float *expected = malloc(sizeof(float) * N * K), *found = malloc(sizeof(float) * N * K);
    REQUIRE(lg_weights_dequantize(weights, expected) == LG_OK);
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) {
        REQUIRE(lg_weights_dequantize(all[i], found) == LG_OK);
        REQUIRE(memcmp(expected, found, sizeof(float) * N * K) == 0);
        lg_weights_free(all[i]);
    }
    free(expected);
    free(found);
    free(device);
    free(codes);
    free(pairs);
    lg_weights_free(weights);
}

static void int4_weights_are_taken_over_exactly_where_the_format_has_them(void) {
    enum { GROUPS = 2, GROUP = 128 };
    uint8_t *codes = malloc(N * K);
    float scales[N * GROUPS], zeros[N * GROUPS], ones[N];
    float *found = malloc(sizeof(float) * N * K);
    for (int i = 0; i < N * K; i++) codes[i] = (uint8_t)((i * 7 + i / K) % 16);
    for (int n = 0; n < N; n++) ones[n] = 0.125f * (float)(n + 1);
    for (int i = 0; i < N * GROUPS; i++) zeros[i] = (float)(i % 3 + 7);

    /* One scale a channel, and the zero 8. */
    lg_import_kind kind = 77;
    double error = -1;
    lg_weights *weights = NULL;
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, N, K, LG_GROUP_CHANNEL, LG_GROUP_CHANNEL, &kind, &error,
                                 &weights) == LG_OK);
    REQUIRE(kind == LG_IMPORT_EXACT && error == 0);
    REQUIRE(lg_weights_dequantize(weights, found) == LG_OK);
    for (int i = 0; i < N * K; i++) REQUIRE(found[i] == ((float)codes[i] - 8) * ones[i / K]);
    lg_weights_free(weights);

    /* Multiples of one number in groups of 128, the last one shorter, into groups of 64. */
    for (int i = 0; i < N * GROUPS; i++) scales[i] = 0.25f * (float)(i % 5 + 1);
    REQUIRE(lg_weights_from_int4(codes, scales, zeros, N, K, GROUP, 64, &kind, &error, &weights) == LG_OK);
    REQUIRE(kind == LG_IMPORT_EXACT && error < 1e-6);
    REQUIRE(lg_weights_dequantize(weights, found) == LG_OK);
    for (int i = 0; i < N * K; i++) {
        int group = i / K * GROUPS + i % K / GROUP;
        float expected = ((float)codes[i] - zeros[group]) * scales[group];
        REQUIRE(fabsf(found[i] - expected) <= 1e-6f * fabsf(expected));
    }
    lg_weights_free(weights);

    /* Other scales become the nearest multiples; groups that the result does not have are quantized again. */
    for (int i = 0; i < N * GROUPS; i++) scales[i] = 1.0f + 0.3f * sinf((float)i);
    REQUIRE(lg_weights_from_int4(codes, scales, NULL, N, K, GROUP, GROUP, &kind, &error, &weights) == LG_OK);
    REQUIRE(kind == LG_IMPORT_SNAPPED && error > 0.001 && error < 0.05);
    lg_weights_free(weights);
    REQUIRE(lg_weights_from_int4(codes, scales, NULL, N, K, GROUP, LG_GROUP_CHANNEL, &kind, &error, &weights) == LG_OK);
    REQUIRE(kind == LG_IMPORT_REQUANTIZED && error < 0.2);
    lg_weights_free(weights);
    /* Nobody has to ask how. */
    REQUIRE(lg_weights_from_int4(codes, scales, zeros, N, K, GROUP, GROUP, NULL, NULL, &weights) == LG_OK);
    lg_weights_free(weights);

    weights = NULL;
    kind = 77;
    codes[K + 2] = 16;
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, N, K, 0, 0, &kind, &error, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(strstr(lg_last_error_message(), "channel 1 at k = 2 is 16"));
    codes[K + 2] = 0;
    ones[3] = NAN;
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, N, K, 0, 0, &kind, &error, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(strstr(lg_last_error_message(), "scale 3"));
    ones[3] = 1;
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, N, K, 0, 65, &kind, &error, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(strstr(lg_last_error_message(), "group of 65"));
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, N, 0, 0, 0, &kind, &error, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, 0, K, 0, 0, &kind, &error, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, SIZE_MAX, K, 1, 0, &kind, &error, &weights) ==
            LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_from_int4(NULL, ones, NULL, N, K, 0, 0, &kind, &error, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_from_int4(codes, NULL, NULL, N, K, 0, 0, &kind, &error, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, N, K, 0, 0, &kind, (double *)((char *)&error + 1), &weights) ==
            LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_from_int4(codes, ones, NULL, N, K, 0, 0, &kind, &error, NULL) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(kind == 77 && !weights);
    free(found);
    free(codes);
}

static void products_are_the_exact_sums_times_the_scales_also_with_strides(void) {
    lg_weights *weights = quantized(0);
    struct lg_quantized close = quantize(0), apart = quantize(256);
    float *represented = malloc(sizeof(float) * N * K);
    REQUIRE(lg_weights_dequantize(weights, represented) == LG_OK);
    const float *scales = lg_weights_channel_scales(weights);
    int32_t sums[M * N], strided[M * (N + 3)];
    float y[M * N], bias[N];
    for (int n = 0; n < N; n++) bias[n] = (float)n;
    memset(strided, 0x55, sizeof(strided));
    struct lg_output raw = {.struct_size = sizeof(raw), .output = sums, .output_type = LG_TYPE_I32};
    struct lg_output wide = {
        .struct_size = sizeof(wide), .output = strided, .output_stride = N + 3, .output_type = LG_TYPE_I32};
    struct lg_output scaled = {.struct_size = sizeof(scaled), .output = y, .output_type = LG_TYPE_F32};
    REQUIRE(lg_cpu_gemm(weights, &close, NULL, &raw) == LG_OK);
    REQUIRE(lg_cpu_gemm(weights, &apart, NULL, &wide) == LG_OK);
    REQUIRE(lg_cpu_gemm(weights, &close, bias, &scaled) == LG_OK);
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            int32_t exact = 0;
            for (int k = 0; k < K; k++)
                exact += close.codes[m * K + k] * (int32_t)lrintf(represented[n * K + k] / scales[n]);
            REQUIRE(sums[m * N + n] == exact && strided[m * (N + 3) + n] == exact);
            REQUIRE(y[m * N + n] == (float)exact * scales[n] * close.scales[m] + bias[n]);
        }
        for (int n = N; n < N + 3; n++) REQUIRE(strided[m * (N + 3) + n] == 0x55555555);
    }
    free(represented);
    free_quantized(&close);
    free_quantized(&apart);
    lg_weights_free(weights);
}

static void a_layer_is_its_quantization_and_its_gemm(void) {
    lg_weights *weights = quantized(0);
    uint16_t halves[M * 2 * K], norm[K], residual[M * K], y[M * N], expected[M * N];
    float smoothing[K], bias[N];
    for (int i = 0; i < M * 2 * K; i++) halves[i] = (uint16_t)(0x3C00 + i % 300); /* f16 from 1 on */
    for (int i = 0; i < M * K; i++) residual[i] = 0x3800;
    for (int k = 0; k < K; k++) norm[k] = 0x3C00, smoothing[k] = 1.0f + (float)(k % 3);
    for (int n = 0; n < N; n++) bias[n] = 0.5f;
    lg_linear *linear = NULL;
    REQUIRE(lg_linear_new(weights, bias, smoothing, &linear) == LG_OK);
    lg_operation operations[] = {LG_OPERATION_PLAIN, LG_OPERATION_RMS_NORM, LG_OPERATION_LAYER_NORM,
                                 LG_OPERATION_SILU_MUL, LG_OPERATION_GELU_TANH_MUL};
    for (int i = 0; i < 5; i++) {
        int is_norm = i == 1 || i == 2;
        struct lg_input input = {
            .struct_size = sizeof(input), .m = M, .k = K, .operation = operations[i], .input_type = LG_TYPE_F16,
            .input = halves, .norm_weight = is_norm ? norm : NULL, .epsilon = 1e-5f,
        };
        struct lg_output output = {.struct_size = sizeof(output), .output = y, .output_type = LG_TYPE_F16};
        REQUIRE(lg_cpu_linear_forward(linear, &input, &output) == LG_OK);

        struct lg_quantized quantized = {.struct_size = sizeof(quantized), .m = M, .k = K};
        quantized.codes = malloc(M * K);
        quantized.scales = malloc(M * sizeof(float));
        input.smoothing = smoothing;
        REQUIRE(lg_cpu_linear_forward(linear, &input, &output) == LG_ERROR_INVALID_ARGUMENT);
        REQUIRE(lg_cpu_quantize(&input, &quantized) == LG_OK);
        output.output = expected;
        REQUIRE(lg_cpu_gemm(weights, &quantized, bias, &output) == LG_OK);
        REQUIRE(memcmp(y, expected, sizeof(y)) == 0);

        /* A residual goes with a norm only, and then it changes. */
        input.residual = residual;
        uint16_t before = residual[7];
        lg_status status = lg_cpu_quantize(&input, &quantized);
        REQUIRE(is_norm ? status == LG_OK : status == LG_ERROR_INVALID_ARGUMENT);
        REQUIRE((residual[7] != before) == is_norm);
        free_quantized(&quantized);
    }
    lg_linear_free(linear);
    lg_weights_free(weights);
}

static void experts_get_the_bits_of_their_own_gemms(void) {
    lg_weights *weights[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) weights[e] = quantized(e);
    lg_experts *experts = NULL;
    REQUIRE(lg_experts_new((const lg_weights *const *)weights, EXPERTS, &experts) == LG_OK);
    size_t bytes = 0;
    REQUIRE(lg_experts_device_size(EXPERTS, N, K, 64, &bytes) == LG_OK);
    void *device = malloc(bytes);
    REQUIRE(lg_experts_device_bytes(experts, device, bytes) == LG_OK);
    free(device);
    struct lg_quantized all = quantize(0);
    int32_t offsets[EXPERTS + 1] = {0, 2, 2, M}, wrong[EXPERTS + 1] = {0, 3, 2, M};
    uint16_t rows[M * N], own[M * N];
    struct lg_grouped grouped = {.struct_size = sizeof(grouped), .offsets = offsets};
    struct lg_output output = {.struct_size = sizeof(output), .output = rows, .output_type = LG_TYPE_BF16};
    REQUIRE(lg_cpu_grouped_gemm(experts, &grouped, &all, &output) == LG_OK);
    for (int e = 0; e < EXPERTS; e++) {
        struct lg_quantized part = all;
        part.m = (size_t)(offsets[e + 1] - offsets[e]);
        part.codes += offsets[e] * K;
        part.scales += offsets[e];
        struct lg_output to = {.struct_size = sizeof(to), .output = own + offsets[e] * N, .output_type = LG_TYPE_BF16};
        REQUIRE(lg_cpu_gemm(weights[e], &part, NULL, &to) == LG_OK);
    }
    REQUIRE(memcmp(rows, own, sizeof(rows)) == 0);
    grouped.offsets = wrong;
    REQUIRE(lg_cpu_grouped_gemm(experts, &grouped, &all, &output) == LG_ERROR_INVALID_ARGUMENT);
    grouped.counts = offsets;
    REQUIRE(lg_cpu_grouped_gemm(experts, &grouped, &all, &output) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(strstr(lg_last_error_message(), "either offsets or counts"));

    /* The second token takes row 3 with weight 1, and skips its other choice. */
    int32_t positions[] = {0, 1, 3, -1};
    float choice[] = {0.5f, 0.5f, 1.0f, 1.0f};
    uint16_t combined[2 * N];
    struct lg_combine combine = {
        .struct_size = sizeof(combine), .tokens = 2, .top_k = 2, .row_count = M, .n = N, .element_type = LG_TYPE_BF16,
        .rows = rows, .positions = positions, .weights = choice, .output = combined,
    };
    REQUIRE(lg_cpu_combine(&combine) == LG_OK);
    REQUIRE(memcmp(combined + N, rows + 3 * N, sizeof(uint16_t) * N) == 0);
    for (int e = 0; e < EXPERTS; e++) lg_weights_free(weights[e]);
    lg_experts_free(experts);
    free_quantized(&all);
}

static void bad_arguments_are_errors_with_a_message_and_write_nothing(void) {
    lg_weights *weights = NULL, *good = quantized(0);
    REQUIRE(lg_weights_quantize(NULL, LG_TYPE_F32, N, K, 64, &weights) == LG_ERROR_INVALID_ARGUMENT && !weights);
    REQUIRE(strstr(lg_last_error_message(), "values is a null pointer"));
    REQUIRE(lg_weights_quantize(values[0], LG_TYPE_F32, N, K, 63, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(strstr(lg_last_error_message(), "group of 63"));
    REQUIRE(lg_weights_quantize(values[0], LG_TYPE_F32, 0, K, 64, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_quantize(values[0], 77, N, K, 64, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_quantize(values[0], LG_TYPE_F32, SIZE_MAX, K, 64, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_quantize((char *)values[0] + 1, LG_TYPE_F32, 1, K, 64, &weights) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_quantize(values[0], LG_TYPE_F32, N, K, 64, NULL) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_weights_load("/no/such/file", &weights) == LG_ERROR_FILE && !weights);
    REQUIRE(strstr(lg_last_error_message(), "/no/such/file"));
    REQUIRE(lg_weights_load(NULL, &weights) == LG_ERROR_INVALID_ARGUMENT);

    struct lg_quantized activations = quantize(0);
    int32_t y[M * N];
    memset(y, 0x55, sizeof(y));
    struct lg_output output = {.struct_size = sizeof(output), .output = y, .output_type = LG_TYPE_I32};
    float bias[N] = {0};
    REQUIRE(lg_cpu_gemm(NULL, &activations, NULL, &output) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_cpu_gemm(good, NULL, NULL, &output) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_cpu_gemm(good, &activations, bias, &output) == LG_ERROR_INVALID_ARGUMENT);
    output.output_stride = N - 1;
    REQUIRE(lg_cpu_gemm(good, &activations, NULL, &output) == LG_ERROR_INVALID_ARGUMENT);
    output.output_stride = 0;
    output.struct_size = 0;
    REQUIRE(lg_cpu_gemm(good, &activations, NULL, &output) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(strstr(lg_last_error_message(), "sizeof(lg_output)"));
    output.struct_size = sizeof(output);
    output.output_type = 0;
    REQUIRE(lg_cpu_gemm(good, &activations, NULL, &output) == LG_ERROR_INVALID_ARGUMENT);
    for (int i = 0; i < M * N; i++) REQUIRE(y[i] == 0x55555555);
    output.output_type = LG_TYPE_I32;
    struct lg_quantized none = activations;
    none.m = 0;
    none.codes = NULL;
    none.scales = NULL;
    output.output = NULL;
    REQUIRE(lg_cpu_gemm(good, &none, NULL, &output) == LG_OK);
    lg_weights_free(NULL);
    lg_gpu_free(NULL);
    free_quantized(&activations);
    lg_weights_free(good);
}

int main(int count, char **arguments) {
    REQUIRE(count == 2);
    folder = arguments[1];
    REQUIRE(lg_abi_version() == LG_ABI_VERSION);
    REQUIRE(strlen(lg_kernels_hash()) == 64);
    fill();
#define RUN(test) (printf(#test "\n"), test())
    RUN(saved_weights_come_back_and_their_parts_make_the_same);
    RUN(int4_weights_are_taken_over_exactly_where_the_format_has_them);
    RUN(products_are_the_exact_sums_times_the_scales_also_with_strides);
    RUN(a_layer_is_its_quantization_and_its_gemm);
    RUN(experts_get_the_bits_of_their_own_gemms);
    RUN(bad_arguments_are_errors_with_a_message_and_write_nothing);
    printf("all passed\n");
    return 0;
}
