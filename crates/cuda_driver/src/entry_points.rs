//! Defines a symbol for each driver function that `cust_raw 0.11` declares,
//! so that programs link without `libcuda`.
//!
//! Each symbol jumps through a slot of its own.
//! The slots hold [`unavailable`] until [`crate::load`] fills them from the real library.
//! A jump leaves the caller's registers and stack unchanged, so no signatures are needed here.
//!
//! A program or library has one symbol of a name, so other code that is linked into it and calls the driver
//! reaches these symbols too. If the program links `libcuda` itself, its calls must arrive there,
//! with or without [`crate::load`]. On Linux `connect_linked_driver` sees to that before `main` runs.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::{mem, ptr};

/// `CUDA_ERROR_STUB_LIBRARY`: "the CUDA driver that the application has loaded is a stub library".
const STUB_LIBRARY: c_int = 34;

/// The function behind an entry point that has no driver function.
///
/// It reads no argument, so a call with any signature is sound.
extern "C" fn unavailable() -> c_int {
    STUB_LIBRARY
}

/// Replaces `cuGetErrorString` and `cuGetErrorName` while no driver is loaded.
///
/// `cust` formats its errors with `cuGetErrorString`, and its `to_string` panics if that call fails.
/// These two functions therefore succeed even without a driver.
///
/// # Safety
/// `text` must be null or valid for a write.
unsafe extern "C" fn describe_any_error(_error: c_int, text: *mut *const c_char) -> c_int {
    const TEXT: &CStr = c"the NVIDIA driver is not loaded";
    if !text.is_null() {
        // SAFETY: the pointer is not null, so the caller guarantees that it is valid for a write.
        unsafe { text.write(TEXT.as_ptr()) };
    }
    0
}

/// Returns the text of `cuGetErrorString` for a status, or `None` for an unknown status.
pub(crate) fn error_string(status: c_int) -> Option<&'static CStr> {
    type GetErrorString = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
    let function = slots::cuGetErrorString.load(Ordering::Acquire);
    // SAFETY: the slot holds the driver's function or `describe_any_error`, and both have this type.
    let function = unsafe { mem::transmute::<*mut c_void, GetErrorString>(function) };
    let mut text = ptr::null();
    // SAFETY: the function accepts any number, and the pointer is valid for a write.
    // It writes null or a string that lives as long as the driver, which is never unloaded.
    unsafe {
        function(status, &mut text);
        if text.is_null() { None } else { Some(CStr::from_ptr(text)) }
    }
}

/// A driver function's name, and the slot that its symbol jumps through.
pub(crate) struct EntryPoint {
    pub(crate) name: &'static str,
    /// The same name for the system's loader.
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    c_name: &'static CStr,
    pub(crate) slot: &'static AtomicPtr<c_void>,
}

macro_rules! initial {
    (cuGetErrorString) => {
        describe_any_error as *mut c_void
    };
    (cuGetErrorName) => {
        describe_any_error as *mut c_void
    };
    ($name:ident) => {
        unavailable as *mut c_void
    };
}

/// The instructions that jump through a slot, for each architecture that has an NVIDIA driver.
///
/// They overwrite no register except x16, which the AArch64 calling convention reserves for such veneers.
#[cfg(target_arch = "x86_64")]
macro_rules! jump_through {
    () => {
        "jmp qword ptr [rip + {slot}]"
    };
}

#[cfg(all(target_arch = "aarch64", not(target_vendor = "apple")))]
macro_rules! jump_through {
    () => {
        "adrp x16, {slot}\nldr x16, [x16, :lo12:{slot}]\nbr x16"
    };
}

#[cfg(all(target_arch = "aarch64", target_vendor = "apple"))]
macro_rules! jump_through {
    () => {
        "adrp x16, {slot}@PAGE\nldr x16, [x16, {slot}@PAGEOFF]\nbr x16"
    };
}

macro_rules! entry_points {
    ($($name:ident)*) => {
        /// The slots, one for each driver function, with the function's name.
        #[allow(non_upper_case_globals)]
        mod slots {
            use super::*;
            $(pub(super) static $name: AtomicPtr<c_void> = AtomicPtr::new(initial!($name));)*
        }

        /// The symbols that `cust` links against, where object files are ELF.
        ///
        /// They are hidden: code in the same program or library finds them when it is linked,
        /// and no other library does when it is loaded. `#[no_mangle]` has no such visibility.
        #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
        #[allow(non_snake_case)]
        mod symbols {
            use super::*;
            $(core::arch::global_asm!(
                concat!(".pushsection .text.", stringify!($name), ",\"ax\",@progbits"),
                concat!(".globl ", stringify!($name)),
                concat!(".hidden ", stringify!($name)),
                concat!(".type ", stringify!($name), ", @function"),
                concat!(stringify!($name), ":"),
                jump_through!(),
                concat!(".size ", stringify!($name), ", . - ", stringify!($name)),
                ".popsection",
                slot = sym slots::$name,
            );)*

            // In the object file of the symbols, so that a program that gets these gets the call as well.
            core::arch::global_asm!(
                ".pushsection .init_array,\"aw\",@init_array",
                ".balign 8",
                ".quad {connect}",
                ".popsection",
                connect = sym linked::connect_linked_driver,
            );

            unsafe extern "C" {
                $(fn $name() -> c_int;)*
            }

            /// Refers to all symbols, so that a linker that reads each archive once takes them before `cust` needs them.
            #[used]
            static KEPT: &[unsafe extern "C" fn() -> c_int] = &[$($name),*];
        }

        /// The symbols that `cust` links against, on other systems. Nothing refers to them through this module.
        #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
        #[allow(non_snake_case)]
        mod symbols {
            use super::*;
            $(
                // SAFETY: these are names of the CUDA driver, and this crate is the one that defines them.
                // Each symbol passes its arguments unchanged to a function of the same signature,
                // or to one that reads none of them.
                #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
                #[unsafe(no_mangle)]
                #[unsafe(naked)]
                extern "C" fn $name() -> c_int {
                    core::arch::naked_asm!(jump_through!(), slot = sym slots::$name);
                }

                // SAFETY: as above, but the function reads no argument and forwards none.
                #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
                #[unsafe(no_mangle)]
                extern "C" fn $name() -> c_int {
                    unavailable()
                }
            )*
        }

        /// All entry points, sorted by name.
        pub(crate) static ENTRY_POINTS: &[EntryPoint] =
            &[$(EntryPoint {
                name: stringify!($name),
                #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
                c_name: match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a name without zero bytes"),
                },
                slot: &slots::$name,
            }),*];
    };
}

entry_points! {
    cuArray3DCreate_v2
    cuArray3DGetDescriptor_v2
    cuArrayCreate_v2
    cuArrayDestroy
    cuArrayGetDescriptor_v2
    cuArrayGetPlane
    cuArrayGetSparseProperties
    cuCtxAttach
    cuCtxCreate_v2
    cuCtxCreate_v3
    cuCtxDestroy_v2
    cuCtxDetach
    cuCtxDisablePeerAccess
    cuCtxEnablePeerAccess
    cuCtxGetApiVersion
    cuCtxGetCacheConfig
    cuCtxGetCurrent
    cuCtxGetDevice
    cuCtxGetExecAffinity
    cuCtxGetFlags
    cuCtxGetLimit
    cuCtxGetSharedMemConfig
    cuCtxGetStreamPriorityRange
    cuCtxPopCurrent_v2
    cuCtxPushCurrent_v2
    cuCtxResetPersistingL2Cache
    cuCtxSetCacheConfig
    cuCtxSetCurrent
    cuCtxSetLimit
    cuCtxSetSharedMemConfig
    cuCtxSynchronize
    cuDestroyExternalMemory
    cuDestroyExternalSemaphore
    cuDeviceCanAccessPeer
    cuDeviceComputeCapability
    cuDeviceGet
    cuDeviceGetAttribute
    cuDeviceGetByPCIBusId
    cuDeviceGetCount
    cuDeviceGetDefaultMemPool
    cuDeviceGetExecAffinitySupport
    cuDeviceGetGraphMemAttribute
    cuDeviceGetLuid
    cuDeviceGetMemPool
    cuDeviceGetName
    cuDeviceGetNvSciSyncAttributes
    cuDeviceGetP2PAttribute
    cuDeviceGetPCIBusId
    cuDeviceGetProperties
    cuDeviceGetTexture1DLinearMaxWidth
    cuDeviceGetUuid
    cuDeviceGetUuid_v2
    cuDeviceGraphMemTrim
    cuDevicePrimaryCtxGetState
    cuDevicePrimaryCtxRelease_v2
    cuDevicePrimaryCtxReset_v2
    cuDevicePrimaryCtxRetain
    cuDevicePrimaryCtxSetFlags_v2
    cuDeviceSetGraphMemAttribute
    cuDeviceSetMemPool
    cuDeviceTotalMem_v2
    cuDriverGetVersion
    cuEventCreate
    cuEventDestroy_v2
    cuEventElapsedTime
    cuEventQuery
    cuEventRecord
    cuEventRecordWithFlags
    cuEventSynchronize
    cuExternalMemoryGetMappedBuffer
    cuExternalMemoryGetMappedMipmappedArray
    cuFlushGPUDirectRDMAWrites
    cuFuncGetAttribute
    cuFuncGetModule
    cuFuncSetAttribute
    cuFuncSetBlockShape
    cuFuncSetCacheConfig
    cuFuncSetSharedMemConfig
    cuFuncSetSharedSize
    cuGetErrorName
    cuGetErrorString
    cuGetExportTable
    cuGetProcAddress
    cuGraphAddChildGraphNode
    cuGraphAddDependencies
    cuGraphAddEmptyNode
    cuGraphAddEventRecordNode
    cuGraphAddEventWaitNode
    cuGraphAddExternalSemaphoresSignalNode
    cuGraphAddExternalSemaphoresWaitNode
    cuGraphAddHostNode
    cuGraphAddKernelNode
    cuGraphAddMemAllocNode
    cuGraphAddMemFreeNode
    cuGraphAddMemcpyNode
    cuGraphAddMemsetNode
    cuGraphChildGraphNodeGetGraph
    cuGraphClone
    cuGraphCreate
    cuGraphDebugDotPrint
    cuGraphDestroy
    cuGraphDestroyNode
    cuGraphEventRecordNodeGetEvent
    cuGraphEventRecordNodeSetEvent
    cuGraphEventWaitNodeGetEvent
    cuGraphEventWaitNodeSetEvent
    cuGraphExecChildGraphNodeSetParams
    cuGraphExecDestroy
    cuGraphExecEventRecordNodeSetEvent
    cuGraphExecEventWaitNodeSetEvent
    cuGraphExecExternalSemaphoresSignalNodeSetParams
    cuGraphExecExternalSemaphoresWaitNodeSetParams
    cuGraphExecHostNodeSetParams
    cuGraphExecKernelNodeSetParams
    cuGraphExecMemcpyNodeSetParams
    cuGraphExecMemsetNodeSetParams
    cuGraphExecUpdate
    cuGraphExternalSemaphoresSignalNodeGetParams
    cuGraphExternalSemaphoresSignalNodeSetParams
    cuGraphExternalSemaphoresWaitNodeGetParams
    cuGraphExternalSemaphoresWaitNodeSetParams
    cuGraphGetEdges
    cuGraphGetNodes
    cuGraphGetRootNodes
    cuGraphHostNodeGetParams
    cuGraphHostNodeSetParams
    cuGraphInstantiateWithFlags
    cuGraphInstantiate_v2
    cuGraphKernelNodeCopyAttributes
    cuGraphKernelNodeGetAttribute
    cuGraphKernelNodeGetParams
    cuGraphKernelNodeSetAttribute
    cuGraphKernelNodeSetParams
    cuGraphLaunch
    cuGraphMemAllocNodeGetParams
    cuGraphMemFreeNodeGetParams
    cuGraphMemcpyNodeGetParams
    cuGraphMemcpyNodeSetParams
    cuGraphMemsetNodeGetParams
    cuGraphMemsetNodeSetParams
    cuGraphNodeFindInClone
    cuGraphNodeGetDependencies
    cuGraphNodeGetDependentNodes
    cuGraphNodeGetType
    cuGraphReleaseUserObject
    cuGraphRemoveDependencies
    cuGraphRetainUserObject
    cuGraphUpload
    cuGraphicsMapResources
    cuGraphicsResourceGetMappedMipmappedArray
    cuGraphicsResourceGetMappedPointer_v2
    cuGraphicsResourceSetMapFlags_v2
    cuGraphicsSubResourceGetMappedArray
    cuGraphicsUnmapResources
    cuGraphicsUnregisterResource
    cuImportExternalMemory
    cuImportExternalSemaphore
    cuInit
    cuIpcCloseMemHandle
    cuIpcGetEventHandle
    cuIpcGetMemHandle
    cuIpcOpenEventHandle
    cuIpcOpenMemHandle_v2
    cuLaunch
    cuLaunchCooperativeKernel
    cuLaunchCooperativeKernelMultiDevice
    cuLaunchGrid
    cuLaunchGridAsync
    cuLaunchHostFunc
    cuLaunchKernel
    cuLinkAddData_v2
    cuLinkAddFile_v2
    cuLinkComplete
    cuLinkCreate_v2
    cuLinkDestroy
    cuMemAddressFree
    cuMemAddressReserve
    cuMemAdvise
    cuMemAllocAsync
    cuMemAllocFromPoolAsync
    cuMemAllocHost_v2
    cuMemAllocManaged
    cuMemAllocPitch_v2
    cuMemAlloc_v2
    cuMemCreate
    cuMemExportToShareableHandle
    cuMemFreeAsync
    cuMemFreeHost
    cuMemFree_v2
    cuMemGetAccess
    cuMemGetAddressRange_v2
    cuMemGetAllocationGranularity
    cuMemGetAllocationPropertiesFromHandle
    cuMemGetInfo_v2
    cuMemHostAlloc
    cuMemHostGetDevicePointer_v2
    cuMemHostGetFlags
    cuMemHostRegister_v2
    cuMemHostUnregister
    cuMemImportFromShareableHandle
    cuMemMap
    cuMemMapArrayAsync
    cuMemPoolCreate
    cuMemPoolDestroy
    cuMemPoolExportPointer
    cuMemPoolExportToShareableHandle
    cuMemPoolGetAccess
    cuMemPoolGetAttribute
    cuMemPoolImportFromShareableHandle
    cuMemPoolImportPointer
    cuMemPoolSetAccess
    cuMemPoolSetAttribute
    cuMemPoolTrimTo
    cuMemPrefetchAsync
    cuMemRangeGetAttribute
    cuMemRangeGetAttributes
    cuMemRelease
    cuMemRetainAllocationHandle
    cuMemSetAccess
    cuMemUnmap
    cuMemcpy
    cuMemcpy2DAsync_v2
    cuMemcpy2DUnaligned_v2
    cuMemcpy2D_v2
    cuMemcpy3DAsync_v2
    cuMemcpy3DPeer
    cuMemcpy3DPeerAsync
    cuMemcpy3D_v2
    cuMemcpyAsync
    cuMemcpyAtoA_v2
    cuMemcpyAtoD_v2
    cuMemcpyAtoHAsync_v2
    cuMemcpyAtoH_v2
    cuMemcpyDtoA_v2
    cuMemcpyDtoDAsync_v2
    cuMemcpyDtoD_v2
    cuMemcpyDtoHAsync_v2
    cuMemcpyDtoH_v2
    cuMemcpyHtoAAsync_v2
    cuMemcpyHtoA_v2
    cuMemcpyHtoDAsync_v2
    cuMemcpyHtoD_v2
    cuMemcpyPeer
    cuMemcpyPeerAsync
    cuMemsetD16Async
    cuMemsetD16_v2
    cuMemsetD2D16Async
    cuMemsetD2D16_v2
    cuMemsetD2D32Async
    cuMemsetD2D32_v2
    cuMemsetD2D8Async
    cuMemsetD2D8_v2
    cuMemsetD32Async
    cuMemsetD32_v2
    cuMemsetD8Async
    cuMemsetD8_v2
    cuMipmappedArrayCreate
    cuMipmappedArrayDestroy
    cuMipmappedArrayGetLevel
    cuMipmappedArrayGetSparseProperties
    cuModuleGetFunction
    cuModuleGetGlobal_v2
    cuModuleGetSurfRef
    cuModuleGetTexRef
    cuModuleLoad
    cuModuleLoadData
    cuModuleLoadDataEx
    cuModuleLoadFatBinary
    cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags
    cuOccupancyMaxPotentialBlockSize
    cuOccupancyMaxPotentialBlockSizeWithFlags
    cuParamSetSize
    cuParamSetTexRef
    cuParamSetf
    cuParamSeti
    cuParamSetv
    cuPointerGetAttribute
    cuPointerGetAttributes
    cuPointerSetAttribute
    cuProfilerInitialize
    cuProfilerStart
    cuProfilerStop
    cuSignalExternalSemaphoresAsync
    cuStreamAddCallback
    cuStreamAttachMemAsync
    cuStreamBatchMemOp
    cuStreamBeginCapture_v2
    cuStreamCopyAttributes
    cuStreamCreate
    cuStreamCreateWithPriority
    cuStreamDestroy_v2
    cuStreamEndCapture
    cuStreamGetAttribute
    cuStreamGetCaptureInfo
    cuStreamGetCaptureInfo_v2
    cuStreamGetCtx
    cuStreamGetFlags
    cuStreamGetPriority
    cuStreamIsCapturing
    cuStreamQuery
    cuStreamSetAttribute
    cuStreamSynchronize
    cuStreamUpdateCaptureDependencies
    cuStreamWaitEvent
    cuStreamWaitValue32
    cuStreamWaitValue64
    cuStreamWriteValue32
    cuStreamWriteValue64
    cuSurfObjectCreate
    cuSurfObjectDestroy
    cuSurfObjectGetResourceDesc
    cuSurfRefGetArray
    cuSurfRefSetArray
    cuTexObjectCreate
    cuTexObjectDestroy
    cuTexObjectGetResourceDesc
    cuTexObjectGetResourceViewDesc
    cuTexObjectGetTextureDesc
    cuTexRefCreate
    cuTexRefDestroy
    cuTexRefGetAddressMode
    cuTexRefGetAddress_v2
    cuTexRefGetArray
    cuTexRefGetBorderColor
    cuTexRefGetFilterMode
    cuTexRefGetFlags
    cuTexRefGetFormat
    cuTexRefGetMaxAnisotropy
    cuTexRefGetMipmapFilterMode
    cuTexRefGetMipmapLevelBias
    cuTexRefGetMipmapLevelClamp
    cuTexRefGetMipmappedArray
    cuTexRefSetAddress2D_v3
    cuTexRefSetAddressMode
    cuTexRefSetAddress_v2
    cuTexRefSetArray
    cuTexRefSetBorderColor
    cuTexRefSetFilterMode
    cuTexRefSetFlags
    cuTexRefSetFormat
    cuTexRefSetMaxAnisotropy
    cuTexRefSetMipmapFilterMode
    cuTexRefSetMipmapLevelBias
    cuTexRefSetMipmapLevelClamp
    cuTexRefSetMipmappedArray
    cuThreadExchangeStreamCaptureMode
    cuUserObjectCreate
    cuUserObjectRelease
    cuUserObjectRetain
    cuWaitExternalSemaphoresAsync
}

/// Connects the entry points to the `libcuda` that this process has linked, if there is one.
///
/// The system's loader calls it before `main`, or when it opens the library that contains it.
/// Libraries that the program links are loaded by then. Nothing is loaded here.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod linked {
    use super::*;

    unsafe extern "C" {
        fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    }

    /// `RTLD_DEFAULT`: search what the program and its libraries have made visible, in the order of loading.
    ///
    /// The symbols of this crate are hidden, so the search never returns one of them.
    const VISIBLE: *mut c_void = ptr::null_mut();

    pub(super) extern "C" fn connect_linked_driver() {
        let find = |name: &CStr| {
            // SAFETY: the name ends with a zero byte.
            unsafe { dlsym(VISIBLE, name.as_ptr()) }
        };
        if find(c"cuDriverGetVersion").is_null() {
            return;
        }
        for entry in ENTRY_POINTS {
            let function = find(entry.c_name);
            if !function.is_null() {
                entry.slot.store(function, Ordering::Release);
            }
        }
    }
}
