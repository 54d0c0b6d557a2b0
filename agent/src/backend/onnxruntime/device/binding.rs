//! Tensors at addresses of a device, bound to a session's inputs and outputs.

use std::ffi::CString;

use ort::AsPointer;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::IoBinding;
use ort::value::{Shape, TensorRefMut};
use vaccel_proto::v1::DType;

/// Lets outputs come to the host.
pub(super) fn bind_to_host(binding: &mut IoBinding, outputs: &[String]) -> ort::Result<()> {
    let host = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUOutput)?;
    outputs.iter().try_for_each(|name| binding.bind_output_to_device(name.clone(), &host))
}

/// An address of a device.
pub(super) struct At<'a> {
    pub(super) memory: &'a AllocationDevice<'static>,
    pub(super) device: usize,
    pub(super) address: u64,
}

/// What a tensor becomes.
pub(super) enum Bind {
    Input(String),
    Output(String),
}

pub(super) fn with_tensor(
    at: &At<'_>,
    dtype: DType,
    shape: &[i64],
    binding: &mut IoBinding,
    bind: &Bind,
) -> ort::Result<()> {
    match dtype {
        DType::U8 => bound::<u8>(at, shape, binding, bind),
        DType::I8 => bound::<i8>(at, shape, binding, bind),
        DType::U16 => bound::<u16>(at, shape, binding, bind),
        DType::I16 => bound::<i16>(at, shape, binding, bind),
        DType::U32 => bound::<u32>(at, shape, binding, bind),
        DType::I32 => bound::<i32>(at, shape, binding, bind),
        DType::U64 => bound::<u64>(at, shape, binding, bind),
        DType::I64 => bound::<i64>(at, shape, binding, bind),
        DType::F16 => bound::<half::f16>(at, shape, binding, bind),
        DType::Bf16 => bound::<half::bf16>(at, shape, binding, bind),
        DType::F32 => bound::<f32>(at, shape, binding, bind),
        DType::F64 => bound::<f64>(at, shape, binding, bind),
        DType::Bool => bound::<bool>(at, shape, binding, bind),
        DType::Bytes | DType::Unspecified => Err(ort::Error::new("a tensor of a type that no device has")),
    }
}

#[allow(unsafe_code, reason = "addresses of a device are not the binding's to check")]
fn bound<T>(at: &At<'_>, shape: &[i64], binding: &mut IoBinding, bind: &Bind) -> ort::Result<()>
where
    T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + 'static,
{
    let device = i32::try_from(at.device).expect("an index of what the driver counted");
    let info = MemoryInfo::new(at.memory.clone(), device, AllocatorType::Device, MemoryType::Default)?;
    // SAFETY: the buffer at the address is as long as a tensor of this type and shape: it was made for its bytes, which
    // `Tensor::check` has compared with both. It lives as long as the place, and the place as long as its binding.
    let tensor = unsafe {
        TensorRefMut::<T>::from_raw(info, at.address as *mut _, Shape::new(shape.iter().copied()))
    }?;
    match bind {
        Bind::Output(name) => binding.bind_output(name.clone(), tensor),
        Bind::Input(name) => {
            let name = CString::new(name.as_str()).map_err(|_| ort::Error::new("a name with a zero"))?;
            // SAFETY: the binding and the tensor are alive, the name ends with a zero, and the library keeps its own
            // reference to the tensor. The safe call would copy it: what is uploaded later would not be seen.
            unsafe {
                let bind = ort::api().BindInput;
                ort::Error::result_from_status(bind(binding.ptr_mut(), name.as_ptr(), tensor.ptr()))
            }
        }
    }
}
