/* What C and Python say to each other: the arguments of every kernel, one struct for each, and which kernel takes which.
 *
 * This list is the only place where they are written down. C makes structs, declarations and a table of them (common.h),
 * Python reads the same lines (abi.py) and compares its own table with that of each compiled library. A line is STRUCT,
 * FIELD, END, KERNEL or SHARING_KERNEL, or a comment. Every field has eight bytes: int64_t, double, or a pointer.
 *
 *     KERNEL(name, struct)            void name(const void *arguments, int64_t first, int64_t last)
 *         works on the items [first, last): rows, unless it is said otherwise. Threads can share a call.
 *     SHARING_KERNEL(name, struct)    void name(const void *arguments, sharer *share, void *fork_join, int64_t threads)
 *         shares its items out itself, by share, which is share_rows of elementwise_cpu.c; in one thread without it.
 *
 * Strides count elements, not bytes. dtype is 0 for fp32 and 1 for bf16; of that dtype is what a void pointer points to. */

/* ------------------------------------------------------------------------------------------------- elementwise_cpu.c */

/* y = f(x) of each element, (rows, columns) */
STRUCT(elementwise)
FIELD(int64_t, dtype)
FIELD(int64_t, columns)
FIELD(const void *, x)
FIELD(void *, y)
END(elementwise)
KERNEL(gelu, elementwise)

STRUCT(gelu_backward)
FIELD(int64_t, dtype)
FIELD(int64_t, columns)
FIELD(const void *, grad)
FIELD(const void *, x)
FIELD(void *, grad_x)
FIELD(void *, y) /* or none */
END(gelu_backward)
KERNEL(gelu_backward, gelu_backward)

STRUCT(rms_norm)
FIELD(int64_t, dtype)
FIELD(const void *, x)
FIELD(const void *, weight)
FIELD(int64_t, columns)
FIELD(double, eps)
FIELD(void *, y)
FIELD(float *, roots)
END(rms_norm)
KERNEL(rms_norm, rms_norm)

STRUCT(rms_norm_backward)
FIELD(int64_t, dtype)
FIELD(const void *, grad)
FIELD(const void *, x)
FIELD(const void *, weight)
FIELD(const float *, roots)
FIELD(int64_t, columns)
FIELD(void *, grad_x)
END(rms_norm_backward)
KERNEL(rms_norm_backward, rms_norm_backward)

STRUCT(add_layer_norm)
FIELD(int64_t, dtype)
FIELD(const void *, x)
FIELD(const void *, residual)
FIELD(const void *, weight)
FIELD(const void *, bias)
FIELD(int64_t, columns)
FIELD(double, eps)
FIELD(void *, total)
FIELD(void *, y)
FIELD(float *, means)
FIELD(float *, roots)
END(add_layer_norm)
KERNEL(add_layer_norm, add_layer_norm)

STRUCT(add_layer_norm_backward)
FIELD(int64_t, dtype)
FIELD(const void *, grad)
FIELD(const void *, total)
FIELD(const void *, weight)
FIELD(const float *, means)
FIELD(const float *, roots)
FIELD(int64_t, columns)
FIELD(void *, grad_x)
END(add_layer_norm_backward)
KERNEL(add_layer_norm_backward, add_layer_norm_backward)

STRUCT(swiglu)
FIELD(int64_t, dtype)
FIELD(int64_t, columns)
FIELD(const void *, gate)
FIELD(const void *, up)
FIELD(void *, y)
FIELD(int64_t, gate_stride)
FIELD(int64_t, up_stride)
FIELD(int64_t, y_stride)
END(swiglu)
KERNEL(swiglu, swiglu)

STRUCT(swiglu_backward)
FIELD(int64_t, dtype)
FIELD(int64_t, columns)
FIELD(const void *, grad)
FIELD(const void *, gate)
FIELD(const void *, up)
FIELD(void *, grad_gate)
FIELD(void *, grad_up)
FIELD(void *, y)
FIELD(int64_t, grad_stride)
FIELD(int64_t, gate_stride)
FIELD(int64_t, up_stride)
FIELD(int64_t, grad_gate_stride)
FIELD(int64_t, grad_up_stride)
FIELD(int64_t, y_stride)
END(swiglu_backward)
KERNEL(swiglu_backward, swiglu_backward)

STRUCT(rotary)
FIELD(int64_t, dtype)
FIELD(int64_t, heads)
FIELD(int64_t, half) /* elements of half a head */
FIELD(const void *, x)
FIELD(const void *, cos)
FIELD(const void *, sin)
FIELD(void *, y)
FIELD(int64_t, x_stride)
FIELD(int64_t, y_stride)
FIELD(int64_t, transposed)
END(rotary)
KERNEL(rotary, rotary)

STRUCT(softmax_cross_entropy)
FIELD(float *, logits)
FIELD(int64_t, columns)
FIELD(const int64_t *, targets)
FIELD(double, smoothing)
FIELD(int64_t, in_place)
FIELD(float *, losses)
END(softmax_cross_entropy)
KERNEL(softmax_cross_entropy, softmax_cross_entropy)

STRUCT(quantize_rows)
FIELD(int64_t, columns)
FIELD(const float *, x)
FIELD(int16_t *, values)
FIELD(float *, scales) /* of each row */
END(quantize_rows)
KERNEL(quantize_rows, quantize_rows)

STRUCT(dequantize_rows)
FIELD(int64_t, columns)
FIELD(const int16_t *, values)
FIELD(const float *, scales)
FIELD(float *, x)
END(dequantize_rows)
KERNEL(dequantize_rows, dequantize_rows)

/* A kernel for run_program to call */
STRUCT(call)
FIELD(void *, kernel)
FIELD(int64_t, arguments) /* they stand so many bytes after the first call */
FIELD(int64_t, items)     /* to share out, or -1 for a SHARING_KERNEL */
FIELD(int64_t, work)      /* operations of all items: a thread is worth some */
END(call)

/* ---------------------------------------------------------------------------------------------------- products_cpu.c */

STRUCT(low_rank)
FIELD(int64_t, rows)
FIELD(int64_t, columns)
FIELD(int64_t, ranks)
FIELD(float *, x)      /* (rows, columns), rows x_stride apart */
FIELD(float *, xa)     /* (rows, ranks), rows xa_stride apart */
FIELD(float *, matrix) /* (ranks, columns) */
FIELD(int64_t, x_stride)
FIELD(int64_t, xa_stride)
FIELD(double, scale)
END(low_rank)
KERNEL(low_rank_project, low_rank) /* xa = scale x matrix^T */
KERNEL(low_rank_update, low_rank)  /* x += scale xa matrix */
KERNEL(low_rank_gather, low_rank)  /* matrix = scale xa^T x; items are groups of 8 columns */

/* y (+)= x P + bias + scale xa matrix: x W^T of a linear layer, or g W, for a prepacked weight */
STRUCT(prepacked_product_fp32)
FIELD(int64_t, rows)
FIELD(int64_t, terms)
FIELD(int64_t, columns)
FIELD(const float *, x) /* (rows, terms) */
FIELD(int64_t, x_stride)
FIELD(const float *, panels) /* P, (terms, columns): [panels][terms][16 columns] */
FIELD(const float *, bias)   /* (columns,) or none */
FIELD(float *, y)            /* (rows, columns) */
FIELD(int64_t, y_stride)
FIELD(int64_t, accumulate) /* add to what y holds */
FIELD(int64_t, ranks)      /* of the LoRA delta, or 0 */
FIELD(const float *, xa)   /* (rows, ranks) */
FIELD(int64_t, xa_stride)
FIELD(const float *, matrix) /* (ranks, columns) */
FIELD(double, scale)
END(prepacked_product_fp32)
SHARING_KERNEL(prepacked_product_fp32, prepacked_product_fp32)

STRUCT(copy_matrix)
FIELD(const float *, source) /* (rows, columns) */
FIELD(int64_t, columns)
FIELD(float *, target)
FIELD(int64_t, row_stride) /* in target: 1 and rows for the transpose */
FIELD(int64_t, column_stride)
END(copy_matrix)
KERNEL(copy_matrix, copy_matrix)

/* target[i] = source[indices[i]] */
STRUCT(select_rows)
FIELD(int64_t, columns)
FIELD(const float *, source)
FIELD(const int64_t *, indices)
FIELD(float *, target)
END(select_rows)
KERNEL(select_rows, select_rows)

/* The other way round: target[i] = source[places[i]], zeros where that is -1 */
STRUCT(scatter_rows)
FIELD(int64_t, columns)
FIELD(const float *, source)
FIELD(const int64_t *, places)
FIELD(float *, target)
END(scatter_rows)
KERNEL(scatter_rows, scatter_rows)

/* y = x + z, element by element; y may be either */
STRUCT(add_values)
FIELD(int64_t, columns)
FIELD(const float *, x)
FIELD(const float *, z)
FIELD(float *, y)
END(add_values)
KERNEL(add_values, add_values)

/* y = x * factors, element by element; y may be x */
STRUCT(multiply_by)
FIELD(int64_t, columns)
FIELD(const float *, x)
FIELD(const float *, factors)
FIELD(float *, y)
END(multiply_by)
KERNEL(multiply_by, multiply_by)

/* Items are pairs of sequence and key-value head. Heads lie side by side. */
STRUCT(short_attention)
FIELD(int64_t, heads)         /* of queries */
FIELD(int64_t, heads_per_key) /* how many of them share a key-value head */
FIELD(int64_t, head_size)     /* elements of a head */
FIELD(int64_t, causal)
FIELD(const int64_t *, starts) /* of each sequence, and where the last one ends */
FIELD(const float *, q)
FIELD(const float *, k)
FIELD(const float *, v)
FIELD(int64_t, q_stride) /* between tokens */
FIELD(int64_t, k_stride)
FIELD(int64_t, v_stride)
FIELD(double, scale)
FIELD(float *, out)        /* (tokens, heads, head_size) */
FIELD(const float *, grad) /* of out */
FIELD(float *, grad_q)
FIELD(float *, grad_k) /* (tokens, key-value heads, head_size) */
FIELD(float *, grad_v)
FIELD(int64_t, longest) /* tokens of the longest sequence */
END(short_attention)
KERNEL(short_attention, short_attention)
KERNEL(short_attention_backward, short_attention)

/* ---------------------------------------------------------------------------------------------------- products_amx.c */

STRUCT(linear)
FIELD(int64_t, rows)
FIELD(int64_t, out_features) /* W is (out_features, in_features) */
FIELD(int64_t, in_features)
FIELD(const float *, x) /* (rows, in_features), or g (rows, out_features) */
FIELD(int64_t, x_stride)
FIELD(const float *, weight)
FIELD(int64_t, weight_stride)
FIELD(const float *, bias) /* (out_features,) or none */
FIELD(float *, y)          /* (rows, out_features), or (rows, in_features) */
FIELD(int64_t, y_stride)
FIELD(int64_t, accumulate) /* add to what y holds */
FIELD(uint16_t *, strips)  /* workspace for those of x; none: see linear_input_gradient */
FIELD(int64_t, strips_ready)
END(linear)
SHARING_KERNEL(linear, linear)                 /* y = x W^T + bias */
SHARING_KERNEL(linear_input_gradient, linear)  /* y (+)= g W */
SHARING_KERNEL(linear_weight_gradient, linear) /* y (+)= g^T W for g (out_features, rows), with x as W */

/* ------------------------------------------------------------------------------------------------------ prepacked_amx.c */

/* A weight's strips; items are strips of 16 columns */
STRUCT(prepack_int16)
FIELD(const float *, weight) /* (columns, terms) */
FIELD(int64_t, weight_stride)
FIELD(int64_t, columns)
FIELD(int64_t, terms)
FIELD(int8_t *, strips)
END(prepack_int16)
KERNEL(prepack_int16, prepack_int16)

/* y (+)= f(x) W^T + bias + delta_scale delta_xa delta_matrix
 * projected_xa = projected_scale f(x) projected_matrix^T, of which delta_xa may be some columns */
STRUCT(prepacked_product_int16)
FIELD(int64_t, rows)
FIELD(int64_t, terms)
FIELD(int64_t, columns)
FIELD(const float *, x) /* (rows, terms) */
FIELD(int64_t, x_stride)
FIELD(kernel *, activation) /* f, which takes struct elementwise, or none; x then has no gaps between its rows */
FIELD(int8_t *, strips)     /* workspace for those of f(x) */
FIELD(int64_t, strips_ready)
FIELD(const int8_t *, weight) /* its strips */
FIELD(const float *, bias)    /* (columns,) or none */
FIELD(float *, y)             /* (rows, columns) */
FIELD(int64_t, y_stride)
FIELD(int64_t, accumulate)     /* add to what y holds */
FIELD(int64_t, delta_ranks)    /* of the LoRA delta, or 0 */
FIELD(const float *, delta_xa) /* (rows, delta_ranks) */
FIELD(const float *, delta_matrix) /* (delta_ranks, columns) */
FIELD(double, delta_scale)
FIELD(int64_t, projected_ranks)
FIELD(float *, projected_xa)           /* (rows, projected_ranks) */
FIELD(const float *, projected_matrix) /* (projected_ranks, terms) */
FIELD(double, projected_scale)
FIELD(int64_t, xa_stride) /* of delta_xa and projected_xa */
END(prepacked_product_int16)
SHARING_KERNEL(prepacked_product_int16, prepacked_product_int16)
