//! Loads, stores and flags, with state space and width explicit.

use core::arch::asm;
use cuda_std::thread;

/// Loads 16 bytes by the instruction `$load` if `$valid`, otherwise returns zeros, without a branch.
///
/// `$class` is the register class of the address.
macro_rules! load_x4_if {
    ($load:literal, $class:ident, $valid:expr, $address:expr) => {{
        let (a, b, c, d);
        asm!(
            "{{",
            ".reg .pred valid;",
            "setp.ne.u32 valid, {5}, 0;",
            "mov.b32 {0}, 0;",
            "mov.b32 {1}, 0;",
            "mov.b32 {2}, 0;",
            "mov.b32 {3}, 0;",
            concat!("@valid ", $load, " {{{0}, {1}, {2}, {3}}}, [{4}];"),
            "}}",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d,
            in($class) $address, in(reg32) $valid as u32,
            options(nostack)
        );
        [a, b, c, d]
    }};
}

/// Cycles after which a wait for another thread block counts as a deadlock: about ten seconds.
pub(super) const DEADLOCK_CYCLES: u64 = 20_000_000_000;

/// Loads 16 bytes of shared memory.
///
/// # Safety
/// `address` is 16-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn load_shared_x4(address: u32) -> [u32; 4] {
    let (a, b, c, d);
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "ld.shared.v4.u32 {{{}, {}, {}, {}}}, [{}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
            options(nostack)
        );
    }
    [a, b, c, d]
}

/// Loads 4 bytes of shared memory.
///
/// # Safety
/// `address` is 4-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn load_shared(address: u32) -> u32 {
    let value;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { asm!("ld.shared.u32 {}, [{}];", out(reg32) value, in(reg32) address, options(nostack)) }
    value
}

/// Loads 2 bytes of shared memory, zero-extended.
///
/// # Safety
/// `address` is 2-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn load_shared_u16(address: u32) -> u32 {
    let value;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .b16 half;",
            "ld.shared.b16 half, [{1}];",
            "cvt.u32.u16 {0}, half;",
            "}}",
            out(reg32) value,
            in(reg32) address,
            options(nostack)
        );
    }
    value
}

/// Loads an f32 from shared memory.
///
/// # Safety
/// `address` is 4-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn load_shared_f32(address: u32) -> f32 {
    let value;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { asm!("ld.shared.f32 {}, [{}];", out(reg32) value, in(reg32) address, options(nostack)) }
    value
}

/// Loads two f32 from shared memory.
///
/// # Safety
/// `address` is 8-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn load_shared_f32x2(address: u32) -> [f32; 2] {
    let (a, b);
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!("ld.shared.v2.f32 {{{}, {}}}, [{}];", out(reg32) a, out(reg32) b, in(reg32) address, options(nostack));
    }
    [a, b]
}

/// Stores an f32 to shared memory.
///
/// # Safety
/// `address` is 4-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn store_shared_f32(address: u32, value: f32) {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { asm!("st.shared.f32 [{}], {};", in(reg32) address, in(reg32) value, options(nostack)) }
}

/// Stores 4 bytes to shared memory.
///
/// # Safety
/// `address` is 4-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn store_shared(address: u32, value: u32) {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { asm!("st.shared.u32 [{}], {};", in(reg32) address, in(reg32) value, options(nostack)) }
}

/// Loads 16 bytes of shared memory if `valid`, otherwise returns zeros, without a branch.
///
/// # Safety
/// If `valid`, `address` is 16-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn load_shared_x4_if(valid: bool, address: u32) -> [i32; 4] {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { load_x4_if!("ld.shared.v4.u32", reg32, valid, address) }
}

/// Stores 16 bytes to shared memory if `valid`, without a branch.
///
/// # Safety
/// If `valid`, `address` is 16-byte aligned in the thread block's shared memory.
#[inline(always)]
pub unsafe fn store_shared_x4_if(valid: bool, address: u32, values: [u32; 4]) {
    let [a, b, c, d] = values;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred valid;",
            "setp.ne.u32 valid, {5}, 0;",
            "@valid st.shared.v4.u32 [{4}], {{{0}, {1}, {2}, {3}}};",
            "}}",
            in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, in(reg32) address, in(reg32) valid as u32,
            options(nostack)
        );
    }
}

/// Loads an f32 from global memory if `valid`, otherwise returns `otherwise`.
///
/// It has no branch, so that several loads are in flight at once.
/// It is not the read-only load: the preceding launch may write the value after this one has begun.
///
/// # Safety
/// If `valid`, `address` is valid and 4-byte aligned.
#[inline(always)]
pub unsafe fn load_global_f32_if(valid: bool, address: u64, otherwise: f32) -> f32 {
    let value;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred valid;",
            "setp.ne.u32 valid, {2}, 0;",
            "mov.f32 {0}, {3};",
            "@valid ld.global.f32 {0}, [{1}];",
            "}}",
            out(reg32) value,
            in(reg64) address,
            in(reg32) valid as u32,
            in(reg32) otherwise,
            options(nostack)
        );
    }
    value
}

/// Loads 4 bytes of global memory if `valid`, otherwise returns 0.
///
/// It is not the read-only load, for the same reason as [`load_global_f32_if`].
///
/// # Safety
/// If `valid`, `address` is valid and 4-byte aligned.
#[inline(always)]
pub unsafe fn load_global_if(valid: bool, address: u64) -> u32 {
    let value;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .pred valid;",
            "setp.ne.u32 valid, {2}, 0;",
            "mov.b32 {0}, 0;",
            "@valid ld.global.u32 {0}, [{1}];",
            "}}",
            out(reg32) value,
            in(reg64) address,
            in(reg32) valid as u32,
            options(nostack)
        );
    }
    value
}

/// Loads 16 bytes of global memory if `valid`, otherwise returns zeros.
///
/// It reads from L2, for data that other thread blocks have written during this kernel.
/// It has no branch, so that several loads are in flight at once.
///
/// # Safety
/// If `valid`, `address` is valid and 16-byte aligned.
#[inline(always)]
pub unsafe fn load_global_x4_if(valid: bool, address: u64) -> [i32; 4] {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { load_x4_if!("ld.global.cg.v4.u32", reg64, valid, address) }
}

/// Loads 16 bytes of global memory if `valid`, otherwise returns zeros.
///
/// It has no branch, so that several loads are in flight at once. The line is not kept in L1.
/// It is not the read-only load: the preceding launch may write the value after this one has begun.
///
/// # Safety
/// If `valid`, `address` is valid and 16-byte aligned.
#[inline(always)]
pub unsafe fn load_once_x4_if(valid: bool, address: u64) -> [u32; 4] {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { load_x4_if!("ld.global.L1::no_allocate.v4.u32", reg64, valid, address) }
}

/// Loads 16 bytes of global memory that no launch writes if `valid`, otherwise returns zeros.
///
/// # Safety
/// If `valid`, `address` is valid and 16-byte aligned.
#[inline(always)]
pub unsafe fn load_constant_x4_if(valid: bool, address: u64) -> [u32; 4] {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { load_x4_if!("ld.global.nc.v4.u32", reg64, valid, address) }
}

/// Loads 4 bytes of global memory.
///
/// # Safety
/// `address` is valid and 4-byte aligned.
#[inline(always)]
pub unsafe fn load_global(address: u64) -> u32 {
    let value;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { asm!("ld.global.u32 {}, [{}];", out(reg32) value, in(reg64) address, options(nostack)) }
    value
}

/// Loads 2 bytes of global memory, zero-extended.
///
/// # Safety
/// `address` is valid and 2-byte aligned.
#[inline(always)]
pub unsafe fn load_global_u16(address: u64) -> u32 {
    let value;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .b16 half;",
            "ld.global.b16 half, [{1}];",
            "cvt.u32.u16 {0}, half;",
            "}}",
            out(reg32) value,
            in(reg64) address,
            options(nostack)
        );
    }
    value
}

/// Stores 16 bytes to global memory.
///
/// # Safety
/// `address` is valid and 16-byte aligned.
#[inline(always)]
pub unsafe fn store_global_x4(address: u64, values: [u32; 4]) {
    let [a, b, c, d] = values;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "st.global.v4.u32 [{}], {{{}, {}, {}, {}}};",
            in(reg64) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d,
            options(nostack)
        );
    }
}

/// Stores 8 bytes to global memory.
///
/// # Safety
/// `address` is valid and 8-byte aligned.
#[inline(always)]
pub unsafe fn store_global_x2(address: u64, values: [u32; 2]) {
    let [a, b] = values;
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!("st.global.v2.u32 [{}], {{{}, {}}};", in(reg64) address, in(reg32) a, in(reg32) b, options(nostack));
    }
}

/// Stores 4 bytes to global memory.
///
/// # Safety
/// `address` is valid and 4-byte aligned.
#[inline(always)]
pub unsafe fn store_global(address: u64, value: u32) {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { asm!("st.global.u32 [{}], {};", in(reg64) address, in(reg32) value, options(nostack)) }
}

/// Stores the lower 2 bytes of `value` to global memory.
///
/// # Safety
/// `address` is valid and 2-byte aligned.
#[inline(always)]
pub unsafe fn store_global_u16(address: u64, value: u32) {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe {
        asm!(
            "{{",
            ".reg .b16 half;",
            "cvt.u16.u32 half, {1};",
            "st.global.b16 [{0}], half;",
            "}}",
            in(reg64) address, in(reg32) value,
            options(nostack)
        );
    }
}

/// Raises the flag at `address`, a u32, with release semantics.
///
/// Whoever sees the flag also sees the earlier writes of this thread,
/// and those of its warpgroup if a barrier came before.
///
/// # Safety
/// `address` is valid and 4-byte aligned.
#[inline(always)]
pub unsafe fn raise_flag(address: u64) {
    // SAFETY: the caller guarantees that the address is valid.
    unsafe { asm!("st.release.gpu.global.u32 [{}], 1;", in(reg64) address, options(nostack)) }
}

/// Waits until the flag at `address` is raised, then lowers it for the next launch.
///
/// # Safety
/// `address` is valid and 4-byte aligned; one thread waits for the flag.
#[inline(always)]
pub unsafe fn await_flag(address: u64) {
    let start = thread::clock64();
    loop {
        let raised: u32;
        // SAFETY: the caller guarantees that the address is valid.
        unsafe {
            asm!("ld.acquire.gpu.global.u32 {}, [{}];", out(reg32) raised, in(reg64) address, options(nostack))
        }
        if raised != 0 {
            break;
        }
        if thread::clock64().wrapping_sub(start) > DEADLOCK_CYCLES {
            thread::trap();
        }
    }
    // SAFETY: as above.
    unsafe { store_global(address, 0) }
}

/// Stores 16 bytes asynchronously to the shared memory of the cluster's thread block `rank`, if `valid`.
///
/// The bytes go to `address` there, and count on the barrier at `barrier` there. It has no branch.
///
/// # Safety
/// If `valid`, both addresses are valid in that thread block, and `address` is 16-byte aligned.
/// Nobody else uses the bytes until the barrier's phase ends, and the thread block has not ended.
#[inline(always)]
pub unsafe fn store_remote_x4_if(valid: bool, address: u32, values: [u32; 4], barrier: u32, rank: u32) {
    let [a, b, c, d] = values;
    // SAFETY: the caller guarantees the addresses and their thread block.
    unsafe {
        asm!(
            "{{",
            ".reg .pred valid;",
            ".reg .b32 there, counted;",
            "setp.ne.u32 valid, {7}, 0;",
            "mapa.shared::cluster.u32 there, {4}, {6};",
            "mapa.shared::cluster.u32 counted, {5}, {6};",
            "@valid st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {{{0}, {1}, {2}, {3}}}, [counted];",
            "}}",
            in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d,
            in(reg32) address, in(reg32) barrier, in(reg32) rank, in(reg32) valid as u32,
            options(nostack)
        );
    }
}

/// Stores 4 bytes to the shared memory of the cluster's thread block `rank`, at `address` there.
///
/// # Safety
/// `address` is valid in that thread block and 4-byte aligned, and the thread block runs.
#[inline(always)]
pub unsafe fn store_remote(address: u32, value: u32, rank: u32) {
    // SAFETY: the caller guarantees the address and its thread block.
    unsafe {
        asm!(
            "{{",
            ".reg .b32 there;",
            "mapa.shared::cluster.u32 there, {0}, {2};",
            "st.shared::cluster.u32 [there], {1};",
            "}}",
            in(reg32) address, in(reg32) value, in(reg32) rank,
            options(nostack)
        );
    }
}
