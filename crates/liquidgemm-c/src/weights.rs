//! Packed weights in host memory, and files.

use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use liquidgemm::gpu::DeviceWeights;
use liquidgemm::{ImportKind, Int4Weights, Method, PackedWeights, smooth_weights};

use crate::arguments::*;
use crate::status::{Failure, guard, lg_status};

/// How `lg_weights_from_int4` took weights over: one of the `LG_IMPORT_…` constants.
pub type lg_import_kind = u32;
/// Every weight is that of the source, up to the rounding of one f32 product.
pub const LG_IMPORT_EXACT: lg_import_kind = 0;
/// The codes are those of the source, the scales the nearest that the packed format has.
pub const LG_IMPORT_SNAPPED: lg_import_kind = 1;
/// The weights were quantized again.
pub const LG_IMPORT_REQUANTIZED: lg_import_kind = 2;

/// Packed weights `[n, k]` in host memory. Any number of threads may use them at the same time.
#[derive(Debug)]
pub struct lg_weights(pub(crate) Arc<PackedWeights>);

/// The shape and the sizes of packed weights.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lg_weights_info {
    /// `sizeof(lg_weights_info)`, set by the caller.
    pub struct_size: usize,
    /// Output channels.
    pub n: usize,
    /// Elements per channel.
    pub k: usize,
    /// Weights of a channel that share a pair: a multiple of 64, or `LG_GROUP_CHANNEL`.
    pub group: usize,
    /// Strips of 64 channels.
    pub strips: usize,
    /// Blocks of 64 along K.
    pub k_blocks: usize,
    /// Groups in a channel.
    pub groups: usize,
    /// Bytes of the packed codes, `[strips, k_blocks, 2048]`.
    pub code_bytes: usize,
    /// Bytes of the packed pairs, `[strips, groups, 128]`.
    pub pair_bytes: usize,
    /// Bytes that the weights take in device memory of the caller.
    pub device_bytes: usize,
}

// SAFETY: numbers, the size first.
unsafe impl Versioned for lg_weights_info {
    const NAME: &str = "lg_weights_info";
}

fn new(weights: PackedWeights) -> lg_weights {
    lg_weights(Arc::new(weights))
}

/// # Safety
/// The path is null or a text.
unsafe fn path<'a>(path: *const c_char) -> Result<&'a Path, Failure> {
    check_pointer("the path", path)?;
    // SAFETY: the caller vouches for the text.
    Ok(Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes())))
}

/// Quantizes and packs row-major weights `[n, k]` of `LG_TYPE_F32`, `LG_TYPE_F16` or `LG_TYPE_BF16`.
///
/// `group` is a positive multiple of 64, or `LG_GROUP_CHANNEL`. The weights are finite.
///
/// # Safety
/// `values` has n · k elements; `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_quantize(
    values: *const c_void,
    value_type: lg_type,
    n: usize,
    k: usize,
    group: usize,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        let (length, group) = (elements("weights", [n, k])?, group_of(group));
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            give(out, || {
                Ok(new(match value_type {
                    LG_TYPE_F32 => {
                        PackedWeights::quantize::<f32>(host("values", values.cast(), length)?, n, k, group)?
                    }
                    LG_TYPE_F16 => {
                        PackedWeights::quantize::<f16>(host("values", values.cast(), length)?, n, k, group)?
                    }
                    LG_TYPE_BF16 => {
                        PackedWeights::quantize::<bf16>(host("values", values.cast(), length)?, n, k, group)?
                    }
                    _ => {
                        return Err(Failure::argument(format!(
                            "value_type is {value_type}; use LG_TYPE_F32, LG_TYPE_F16 or LG_TYPE_BF16"
                        )));
                    }
                }))
            })
        }
    })
}

/// Multiplies column j of row-major weights `[n, k]` by `smoothing[j]`, and writes f32 `[n, k]`.
///
/// This is the offline half of smoothing: quantize the result, and give the same vector to the linear layer.
///
/// # Safety
/// `values` and `out` have n · k elements and don't overlap; `smoothing` has k.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_smooth_weights(
    values: *const f32,
    n: usize,
    k: usize,
    smoothing: *const f32,
    out: *mut f32,
) -> lg_status {
    guard(|| {
        let length = elements("weights", [n, k])?;
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let smoothed =
                smooth_weights(host("values", values, length)?, n, k, host("smoothing", smoothing, k)?)?;
            host_mut("out", out, length)?.copy_from_slice(&smoothed);
        }
        Ok(())
    })
}

/// Packs codes and pairs that another program chose. `lg_weights_from_int4` takes codes with floating-point scales of groups.
///
/// - `codes`: row-major `[n, k]`, values 0 to 15, one per byte.
/// - `pairs`: row-major `[n, groups, 2]`: `(s, a)` of each group, with s ≥ 1 and 15·s + a ≤ 255.
/// - `channel_scales`: f32 `[n]`, finite.
///
/// A code q represents the weight `channel_scale · (q · s + a − 128)`.
///
/// # Safety
/// The arrays have these elements; `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_pack(
    codes: *const u8,
    pairs: *const u8,
    channel_scales: *const f32,
    n: usize,
    k: usize,
    group: usize,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        let group = group_of(group);
        let count = elements("pairs", [n, group.count(k)?])?;
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let codes = host("codes", codes, elements("codes", [n, k])?)?;
            let pairs = host("pairs", pairs.cast::<[u8; 2]>(), count)?;
            let pairs: Vec<(u8, u8)> = pairs.iter().map(|&[s, a]| (s, a)).collect();
            let scales = host("channel_scales", channel_scales, n)?.to_vec();
            give(out, || Ok(new(PackedWeights::pack(codes, &pairs, scales, n, k, group)?)))
        }
    })
}

/// Packs weights that another quantizer has quantized to four bits, such as GPTQ, AWQ or compressed-tensors.
///
/// - `codes`: row-major `[n, k]`, values 0 to 15, one per byte. Signed codes become such codes by adding 8.
/// - `scales`: f32, row-major `[n, source_groups]`, finite, with `source_groups` = ⌈k / `source_group`⌉.
/// - `zeros`: f32, row-major `[n, source_groups]`, finite, or null if every zero is 8.
/// - `source_group`: the weights of a channel that share a scale, 1 or more, or `LG_GROUP_CHANNEL`. The last group may be shorter.
/// - `group`: that of the result, a positive multiple of 64, or `LG_GROUP_CHANNEL`.
/// - `kind`, `error`: null, or where to write how the weights were taken over, and `‖packed − source‖ / ‖source‖`.
///
/// A code q represents the weight `(q − zero) · scale`. Where the packed format has these weights, the result is exact: always with
/// one scale a channel and integer zeros, and also where the scales of a channel are multiples of one number, by integers from 1 to 17
/// that keep `15·s + a ≤ 255`. Otherwise the scales become the nearest that the format has, or the weights are quantized again,
/// whichever has the smaller error.
/// They are always quantized again if `group` neither is nor divides `source_group`, or if a scale is negative.
///
/// # Safety
/// The arrays have these elements; `kind` and `error` are null or valid for a write; `out` is valid for a write.
/// `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_from_int4(
    codes: *const u8,
    scales: *const f32,
    zeros: *const f32,
    n: usize,
    k: usize,
    source_group: usize,
    group: usize,
    kind: *mut lg_import_kind,
    error: *mut f64,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        let source_group = if source_group == LG_GROUP_CHANNEL { k } else { source_group };
        let groups = if k == 0 { 0 } else { k.div_ceil(source_group) };
        let count = elements("scales", [n, groups])?;
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let codes = host("codes", codes, elements("codes", [n, k])?)?.to_vec();
            let scales = host("scales", scales, count)?.to_vec();
            let zeros = if zeros.is_null() { None } else { Some(host("zeros", zeros, count)?.to_vec()) };
            give(out, || {
                // Nothing may fail once the first result is written.
                check_optional("kind", kind)?;
                check_optional("error", error)?;
                let source = Int4Weights::new(codes, scales, zeros, [n, k], source_group)?;
                let taken = PackedWeights::from_int4(&source, group_of(group), Method::default())?;
                if !kind.is_null() {
                    kind.write(match taken.kind {
                        ImportKind::Exact => LG_IMPORT_EXACT,
                        ImportKind::Snapped => LG_IMPORT_SNAPPED,
                        ImportKind::Requantized => LG_IMPORT_REQUANTIZED,
                    });
                }
                if !error.is_null() {
                    error.write(taken.error);
                }
                Ok(new(taken.weights))
            })
        }
    })
}

/// Assembles weights from packed parts, such as a file or `lg_weights_codes` and its kin have them.
///
/// # Safety
/// `codes` has `code_bytes` bytes, `pairs` has `pair_bytes`, `channel_scales` has n elements;
/// `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_from_parts(
    codes: *const u8,
    code_bytes: usize,
    pairs: *const u8,
    pair_bytes: usize,
    channel_scales: *const f32,
    n: usize,
    k: usize,
    group: usize,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let codes = host("codes", codes, code_bytes)?.to_vec();
            let pairs = host("pairs", pairs, pair_bytes)?.to_vec();
            let scales = host("channel_scales", channel_scales, n)?.to_vec();
            give(out, || Ok(new(PackedWeights::from_parts(codes, pairs, scales, n, k, group_of(group))?)))
        }
    })
}

/// Takes weights back from the bytes that `lg_weights_device_bytes` wrote.
///
/// # Safety
/// `bytes` has `length` bytes; `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_from_device_bytes(
    bytes: *const c_void,
    length: usize,
    n: usize,
    k: usize,
    group: usize,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let bytes = host("bytes", bytes.cast::<u8>(), length)?;
            give(out, || Ok(new(PackedWeights::from_device_bytes(bytes, [n, k], group_of(group))?)))
        }
    })
}

/// Loads weights from a `.safetensors` file of this library.
///
/// # Safety
/// `path` is a text that ends with a zero byte; `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_load(path: *const c_char, out: *mut *mut lg_weights) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let path = self::path(path)?;
            give(out, || Ok(new(PackedWeights::load(path)?)))
        }
    })
}

/// Saves weights to a `.safetensors` file. It replaces an existing file only once the new one is complete.
///
/// # Safety
/// `weights` is a live handle, `path` a text that ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_save(weights: *const lg_weights, path: *const c_char) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let (weights, path) = unsafe { (handle("weights", weights)?, self::path(path)?) };
        Ok(weights.0.save(path)?)
    })
}

/// Stacks the channels of several weights with the same k and group, such as Q, K and V, or gate and up.
///
/// # Safety
/// `parts` has `count` live handles; `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_join_channels(
    parts: *const *const lg_weights,
    count: usize,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let parts = handles("weights", parts, count)?;
            give(out, || Ok(new(PackedWeights::join_channels(&parts)?)))
        }
    })
}

/// Returns the weights of the output channels from `first` up to `end`: a shard for column parallelism.
///
/// # Safety
/// `weights` is a live handle; `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_channel_shard(
    weights: *const lg_weights,
    first: usize,
    end: usize,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let weights = handle("weights", weights)?;
            give(out, || Ok(new(weights.0.channel_shard(first..end)?)))
        }
    })
}

/// Returns the weights of the input channels from `first` up to `end`, at group boundaries: a shard for row parallelism.
///
/// # Safety
/// `weights` is a live handle; `out` is valid for a write. `lg_weights_free` frees the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_input_shard(
    weights: *const lg_weights,
    first: usize,
    end: usize,
    out: *mut *mut lg_weights,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let weights = handle("weights", weights)?;
            give(out, || Ok(new(weights.0.input_shard(first..end)?)))
        }
    })
}

/// Writes the shape and the sizes of weights. The caller sets `info->struct_size`.
///
/// # Safety
/// `weights` is a live handle; `info` points to a structure of the size that it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_get_info(
    weights: *const lg_weights,
    info: *mut lg_weights_info,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let weights = &*handle("weights", weights)?.0;
            let asked = read(info)?;
            let (n, k, group) = (weights.n(), weights.k(), weights.group());
            let found = lg_weights_info {
                struct_size: asked.struct_size,
                n,
                k,
                group: group_code(group),
                strips: weights.strips(),
                k_blocks: weights.k_blocks(),
                groups: weights.groups(),
                code_bytes: weights.codes().len(),
                pair_bytes: weights.pairs().len(),
                device_bytes: DeviceWeights::bytes_for(n, k, group)?,
            };
            put("info", info, found)
        }
    })
}

/// Returns the packed codes, `[strips, k_blocks, 2048]`, or null for a null handle. They live as long as the weights.
///
/// # Safety
/// `weights` is null or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_codes(weights: *const lg_weights) -> *const u8 {
    // SAFETY: the caller vouches for the handle.
    unsafe { weights.as_ref() }.map_or(std::ptr::null(), |weights| weights.0.codes().as_ptr())
}

/// Returns the packed pairs, `[strips, groups, 128]`, or null for a null handle. They live as long as the weights.
///
/// # Safety
/// `weights` is null or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_pairs(weights: *const lg_weights) -> *const u8 {
    // SAFETY: the caller vouches for the handle.
    unsafe { weights.as_ref() }.map_or(std::ptr::null(), |weights| weights.0.pairs().as_ptr())
}

/// Returns the channel scales, f32 `[n]`, or null for a null handle. They live as long as the weights.
///
/// # Safety
/// `weights` is null or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_channel_scales(weights: *const lg_weights) -> *const f32 {
    // SAFETY: the caller vouches for the handle.
    unsafe { weights.as_ref() }.map_or(std::ptr::null(), |weights| weights.0.channel_scales().as_ptr())
}

/// Writes the codes, row-major `[n, k]`, one per byte, and the pairs, row-major `[n, groups, 2]`.
/// This is the inverse of `lg_weights_pack`.
///
/// # Safety
/// `weights` is a live handle; `codes` and `pairs` have these elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_unpack(
    weights: *const lg_weights,
    codes: *mut u8,
    pairs: *mut u8,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let weights = &*handle("weights", weights)?.0;
            let unpacked = weights.unpack();
            let codes = host_mut("codes", codes, unpacked.codes.len())?;
            let pairs = host_mut("pairs", pairs.cast::<[u8; 2]>(), unpacked.pairs.len())?;
            codes.copy_from_slice(&unpacked.codes);
            for (to, (s, a)) in pairs.iter_mut().zip(unpacked.pairs) {
                *to = [s, a];
            }
        }
        Ok(())
    })
}

/// Writes the weights that the codes represent, f32, row-major `[n, k]`.
///
/// # Safety
/// `weights` is a live handle; `values` has n · k elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_dequantize(weights: *const lg_weights, values: *mut f32) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let weights = &*handle("weights", weights)?.0;
            host_mut("values", values, weights.n() * weights.k())?.copy_from_slice(&weights.dequantize());
        }
        Ok(())
    })
}

/// Writes the bytes that weights `[n, k]` take in device memory of the caller.
///
/// # Safety
/// `bytes` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_device_size(
    n: usize,
    k: usize,
    group: usize,
    bytes: *mut usize,
) -> lg_status {
    guard(|| {
        let needed = DeviceWeights::bytes_for(n, k, group_of(group))?;
        // SAFETY: the caller vouches for the pointer.
        unsafe { put("bytes", bytes, needed) }
    })
}

/// Writes the weights as they lie in device memory of the caller, to host memory.
/// Copy them to the GPU, and `lg_gpu_weights_in` takes them there.
///
/// # Safety
/// `weights` is a live handle; `bytes` has `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_device_bytes(
    weights: *const lg_weights,
    bytes: *mut c_void,
    length: usize,
) -> lg_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let found = handle("weights", weights)?.0.device_bytes()?;
            copy_bytes(&found, bytes, length)
        }
    })
}

/// Frees weights. Null is allowed.
///
/// # Safety
/// `weights` is null, or a handle that is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lg_weights_free(weights: *mut lg_weights) {
    // SAFETY: the caller vouches for the handle.
    unsafe { free(weights) }
}

/// Copies bytes to memory of exactly their length.
///
/// # Safety
/// `to` has `length` bytes.
pub(crate) unsafe fn copy_bytes(from: &[u8], to: *mut c_void, length: usize) -> Result<(), Failure> {
    if length != from.len() {
        return Err(Failure::argument(format!(
            "the memory has {length} bytes, but {} are written",
            from.len()
        )));
    }
    // SAFETY: the caller vouches for the memory.
    unsafe { host_mut("bytes", to.cast::<u8>(), length) }?.copy_from_slice(from);
    Ok(())
}

/// Shares the weights of an array of handles.
///
/// # Safety
/// The array has `count` live handles.
pub(crate) unsafe fn handles(
    what: &str,
    parts: *const *const lg_weights,
    count: usize,
) -> Result<Vec<Arc<PackedWeights>>, Failure> {
    // SAFETY: the caller vouches for the array and the handles.
    unsafe {
        let parts = host(what, parts, count)?;
        parts.iter().map(|&part| Ok(handle(what, part)?.0.clone())).collect()
    }
}
