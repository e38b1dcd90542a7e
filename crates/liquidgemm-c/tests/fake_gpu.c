/* Tests of the functions for the GPU, on the fake driver of the workspace's tests, whose launches compute nothing.
 * tests/c_program.rs compiles and runs it. What the launches compute is tested on a GPU, through Python.
 *
 * Device addresses are only numbers here. */

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

enum { M = 16, N = 128, K = 256, EXPERTS = 2 };

static void *at(uintptr_t address) { return (void *)address; }

int main(void) {
    lg_gpu *gpu = NULL;
    REQUIRE(lg_gpu_open(-2, &gpu) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_gpu_open(9, &gpu) == LG_ERROR_NO_GPU && gpu == NULL);
    REQUIRE(lg_gpu_from_context(NULL, &gpu) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_gpu_open(0, &gpu) == LG_OK);
    struct lg_gpu_info info = {.struct_size = sizeof(info)};
    REQUIRE(lg_gpu_get_info(gpu, &info) == LG_OK && info.multiprocessors > 0 && strlen(info.name) > 0);

    static float values[N * K];
    for (int i = 0; i < N * K; i++) values[i] = (float)(i % 17);
    lg_weights *weights = NULL;
    lg_linear *linear = NULL;
    lg_experts *experts = NULL;
    REQUIRE(lg_weights_quantize(values, LG_TYPE_F32, N, K, 64, &weights) == LG_OK);
    REQUIRE(lg_linear_new(weights, values, NULL, &linear) == LG_OK);
    const lg_weights *both[EXPERTS] = {weights, weights};
    REQUIRE(lg_experts_new(both, EXPERTS, &experts) == LG_OK);
    size_t bytes = 0, expert_bytes = 0, scratch_bytes = 0;
    REQUIRE(lg_weights_device_size(N, K, 64, &bytes) == LG_OK);
    REQUIRE(lg_experts_device_size(EXPERTS, N, K, 64, &expert_bytes) == LG_OK);
    REQUIRE(lg_linear_scratch_size(M, K, &scratch_bytes) == LG_OK && scratch_bytes == M * (K + 4));

    /* Weights, layers, experts and workspaces, in memory of the library and of the caller. */
    lg_gpu_weights *own = NULL, *in = NULL, *bad = NULL;
    lg_gpu_linear *own_layer = NULL, *layer_in = NULL;
    lg_gpu_experts *own_experts = NULL, *experts_in = NULL;
    lg_gpu_workspace *workspace = NULL, *workspace_in = NULL;
    REQUIRE(lg_gpu_upload(gpu, weights, &own) == LG_OK);
    REQUIRE(lg_gpu_weights_in(gpu, at(0x10000), bytes, N, K, 64, &in) == LG_OK);
    REQUIRE(lg_gpu_weights_in(gpu, at(0x10000), bytes - 1, N, K, 64, &bad) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_gpu_weights_in(gpu, at(0x10010), bytes, N, K, 64, &bad) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_gpu_weights_in(gpu, NULL, bytes, N, K, 64, &bad) == LG_ERROR_INVALID_ARGUMENT && !bad);
    REQUIRE(lg_gpu_upload_linear(gpu, linear, &own_layer) == LG_OK);
    REQUIRE(lg_gpu_linear_in(gpu, at(0x10000), bytes, N, K, 64, at(0x20000), NULL, &layer_in) == LG_OK);
    REQUIRE(lg_gpu_upload_experts(gpu, experts, &own_experts) == LG_OK);
    REQUIRE(lg_gpu_experts_in(gpu, at(0x10000), expert_bytes, EXPERTS, N, K, 64, &experts_in) == LG_OK);
    REQUIRE(lg_gpu_workspace_new(gpu, NULL, 0, &workspace) == LG_OK);
    REQUIRE(lg_gpu_workspace_new(gpu, at(0x100), 5, &workspace_in) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(strstr(lg_last_error_message(), "workspace"));

    REQUIRE(lg_gpu_prepare(gpu, N, K, 1, M) == LG_OK);
    for (lg_operation operation = 0; operation < 5; operation++)
        REQUIRE(lg_gpu_prepare_quantize(gpu, operation, LG_TYPE_F16, K) == LG_OK);
    REQUIRE(lg_gpu_prepare_quantize(gpu, 5, LG_TYPE_F16, K) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_gpu_prepare_grouped(gpu) == LG_OK);
    lg_plan *plan = NULL, *other = NULL;
    REQUIRE(lg_gpu_plan(gpu, M, N, K, &plan) == LG_OK && strlen(lg_plan_text(plan)) > 0);
    REQUIRE(lg_gpu_plan(gpu, M + 1, N, K, &other) == LG_OK);

    /* Launches. */
    struct lg_input input = {
        .struct_size = sizeof(input), .m = M, .k = K, .input_type = LG_TYPE_BF16, .input = at(0x30000)};
    struct lg_quantized codes = {
        .struct_size = sizeof(codes), .m = M, .k = K, .codes = at(0x40000), .code_stride = K, .scales = at(0x50000)};
    struct lg_output output = {.struct_size = sizeof(output), .output = at(0x60000), .output_type = LG_TYPE_BF16};
    struct lg_linear_memory memory = {
        .struct_size = sizeof(memory), .memory = at(0x10000), .memory_bytes = bytes, .n = N, .k = K, .group = 64};
    void *scratch = at(0x70000), *stream = NULL;
    REQUIRE(lg_gpu_quantize(gpu, &input, &codes, stream) == LG_OK);
    REQUIRE(lg_gpu_gemm(gpu, own, &codes, NULL, &output, NULL, workspace, stream) == LG_OK);
    REQUIRE(lg_gpu_gemm(gpu, in, &codes, at(0x20000), &output, plan, workspace, stream) == LG_OK);
    REQUIRE(lg_gpu_gemm(gpu, in, &codes, NULL, &output, other, workspace, stream) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_gpu_linear_forward(gpu, own_layer, &input, &output, scratch, scratch_bytes, workspace, stream) == LG_OK);
    REQUIRE(lg_gpu_linear_forward(gpu, layer_in, &input, &output, scratch, scratch_bytes, workspace, stream) == LG_OK);
    REQUIRE(lg_gpu_linear_forward_in(gpu, &memory, &input, &output, scratch, scratch_bytes, workspace, stream) == LG_OK);
    REQUIRE(lg_gpu_linear_forward_in(gpu, &memory, &input, &output, scratch, scratch_bytes - 1, workspace, stream) ==
            LG_ERROR_INVALID_ARGUMENT);
    struct lg_grouped grouped = {.struct_size = sizeof(grouped), .offsets = at(0x80000)};
    REQUIRE(lg_gpu_grouped_gemm(gpu, own_experts, &grouped, &codes, &output, stream) == LG_OK);
    grouped.offsets = NULL;
    grouped.counts = at(0x80000);
    grouped.capacity = M / EXPERTS;
    REQUIRE(lg_gpu_grouped_gemm(gpu, experts_in, &grouped, &codes, &output, stream) == LG_OK);
    grouped.capacity = M;
    REQUIRE(lg_gpu_grouped_gemm(gpu, experts_in, &grouped, &codes, &output, stream) == LG_ERROR_INVALID_ARGUMENT);
    struct lg_combine combine = {
        .struct_size = sizeof(combine), .tokens = 4, .top_k = 2, .row_count = M, .n = N, .element_type = LG_TYPE_BF16,
        .rows = at(0x60000), .positions = at(0x80000), .weights = at(0x90000), .output = at(0xA0000)};
    REQUIRE(lg_gpu_combine(gpu, &combine, stream) == LG_OK);

    /* Wrong calls. */
    input.input = NULL;
    REQUIRE(lg_gpu_quantize(gpu, &input, &codes, stream) == LG_ERROR_INVALID_ARGUMENT);
    input.input = at(0x30001);
    REQUIRE(lg_gpu_quantize(gpu, &input, &codes, stream) == LG_ERROR_INVALID_ARGUMENT);
    input.input = at(0x30000);
    input.input_type = LG_TYPE_F32;
    REQUIRE(lg_gpu_quantize(gpu, &input, &codes, stream) == LG_ERROR_INVALID_ARGUMENT);
    input.input_type = LG_TYPE_BF16;
    codes.k = K - 64;
    REQUIRE(lg_gpu_gemm(gpu, own, &codes, NULL, &output, NULL, workspace, stream) == LG_ERROR_INVALID_ARGUMENT);
    REQUIRE(lg_gpu_gemm(gpu, own, &codes, NULL, &output, NULL, NULL, stream) == LG_ERROR_INVALID_ARGUMENT);
    combine.element_type = LG_TYPE_F32;
    REQUIRE(lg_gpu_combine(gpu, &combine, stream) == LG_ERROR_INVALID_ARGUMENT);

    /* What lives on the GPU may outlive the handle of the GPU. */
    lg_gpu_free(gpu);
    lg_gpu_weights_free(own);
    lg_gpu_weights_free(in);
    lg_gpu_linear_free(own_layer);
    lg_gpu_linear_free(layer_in);
    lg_gpu_experts_free(own_experts);
    lg_gpu_experts_free(experts_in);
    lg_gpu_workspace_free(workspace);
    lg_plan_free(plan);
    lg_plan_free(other);
    lg_experts_free(experts);
    lg_linear_free(linear);
    lg_weights_free(weights);
    printf("all passed\n");
    return 0;
}
