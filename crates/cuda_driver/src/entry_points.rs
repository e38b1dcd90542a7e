//! One symbol for each driver function that `cust_raw 0.11` declares, so that nothing needs `libcuda` to
//! link. Each is a jump through a slot of its own; [`crate::load`] fills the slots from the real library, and
//! until then they hold [`unavailable`]. A jump leaves registers and stack as the caller set them up, which is
//! why no signature appears here.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::{mem, ptr};

/// `CUDA_ERROR_STUB_LIBRARY`: "the CUDA driver that the application has loaded is a stub library".
const STUB_LIBRARY: c_int = 34;

/// What an entry point does while there is no driver function behind it. It reads no argument, so any
/// call reaches it soundly.
extern "C" fn unavailable() -> c_int {
    STUB_LIBRARY
}

/// Stands for `cuGetErrorString` and `cuGetErrorName`. `cust` formats its errors through the first, and a
/// failing one makes `to_string` panic, so these two answer even without a driver.
///
/// # Safety
/// `text` must be null or valid for a write.
unsafe extern "C" fn describe_any_error(_error: c_int, text: *mut *const c_char) -> c_int {
    const TEXT: &CStr = c"the NVIDIA driver is not loaded";
    if !text.is_null() {
        // SAFETY: the caller, as the driver's own contract demands, passes a pointer to write to.
        unsafe { text.write(TEXT.as_ptr()) };
    }
    0
}

/// What `cuGetErrorString` has to say about a status; nothing about a number that it does not know.
pub(crate) fn error_string(status: c_int) -> Option<&'static CStr> {
    type GetErrorString = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
    let function = slots::cuGetErrorString.load(Ordering::Acquire);
    // SAFETY: the slot holds the driver's function or `describe_any_error`, both of this type.
    let function = unsafe { mem::transmute::<*mut c_void, GetErrorString>(function) };
    let mut text = ptr::null();
    // SAFETY: any number may be asked about, and the pointer is valid for a write. What is written is null or a string
    // that lives as long as the driver, which is never unloaded.
    unsafe {
        function(status, &mut text);
        if text.is_null() { None } else { Some(CStr::from_ptr(text)) }
    }
}

/// A driver function's name and the slot that its symbol jumps through.
pub(crate) struct EntryPoint {
    pub(crate) name: &'static str,
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

/// The jump: one per architecture that has an NVIDIA driver, and a constant answer on the others. Only
/// x16, which the AArch64 calling convention reserves for such veneers, is overwritten.
macro_rules! jump_through {
    ($slot:path) => {
        #[cfg(target_arch = "x86_64")]
        core::arch::naked_asm!("jmp qword ptr [rip + {slot}]", slot = sym $slot);
        #[cfg(all(target_arch = "aarch64", not(target_vendor = "apple")))]
        core::arch::naked_asm!(
            "adrp x16, {slot}",
            "ldr x16, [x16, :lo12:{slot}]",
            "br x16",
            slot = sym $slot,
        );
        #[cfg(all(target_arch = "aarch64", target_vendor = "apple"))]
        core::arch::naked_asm!(
            "adrp x16, {slot}@PAGE",
            "ldr x16, [x16, {slot}@PAGEOFF]",
            "br x16",
            slot = sym $slot,
        );
    };
}

macro_rules! entry_points {
    ($($name:ident)*) => {
        /// One slot per driver function, named like it.
        #[allow(non_upper_case_globals)]
        mod slots {
            use super::*;
            $(pub(super) static $name: AtomicPtr<c_void> = AtomicPtr::new(initial!($name));)*
        }

        /// The symbols that `cust` links against. They are reached by name only, never through this module.
        #[allow(non_snake_case)]
        mod symbols {
            use super::*;
            $(
                // SAFETY: the names are the CUDA driver's, which this crate exists to define, and each
                // hands its arguments untouched to a function of the same signature (or to one that
                // reads none of them).
                #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
                #[unsafe(no_mangle)]
                #[unsafe(naked)]
                extern "C" fn $name() -> c_int {
                    jump_through!(slots::$name);
                }

                // SAFETY: as above; nothing is forwarded.
                #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
                #[unsafe(no_mangle)]
                extern "C" fn $name() -> c_int {
                    unavailable()
                }
            )*
        }

        /// Every entry point, in the order of their names.
        pub(crate) static ENTRY_POINTS: &[EntryPoint] =
            &[$(EntryPoint { name: stringify!($name), slot: &slots::$name }),*];
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
