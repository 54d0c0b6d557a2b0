//! The numeric operations: matrix products, arrays, images, and a processor kept busy.
//!
//! Sizes, types and names are checked before anything is sent; what is wrong names its field as the agent would.

use std::time::Duration;

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::compute::arrange;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::{
    DType, FpgaArraycopyRequest, FpgaMmultRequest, FpgaParallelRequest, FpgaVectoraddRequest, MbenchRequest,
    MinmaxRequest, NamedTensor, OpencvRequest, SgemmRequest, Tensor, TorchSgemmRequest,
};

use crate::session::{Session, malformed, named};

/// A product of two matrices: `alpha * a * b + beta * c`, row-major, in f32.
///
/// ```
/// # use vaccel_client::{Sgemm, Tensor};
/// let a = Tensor::new(&[2, 3], &[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0])?;
/// let b = Tensor::new(&[3, 1], &[1.0_f32, 0.0, -1.0])?;
/// let halved = Sgemm { alpha: 0.5, ..Sgemm::new(a, b)? };
/// # Ok::<(), vaccel_client::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sgemm {
    /// Rows of `a` and `c`.
    pub m: i64,
    /// Columns of `b` and `c`.
    pub n: i64,
    /// Columns of `a` and rows of `b`.
    pub k: i64,
    /// Factor of the product.
    pub alpha: f32,
    /// Numbers of the first matrix; their shape does not matter.
    pub a: Tensor,
    /// Elements from one row of `a` to the next; 0 for `k`.
    pub lda: i64,
    /// Numbers of the second matrix.
    pub b: Tensor,
    /// Elements from one row of `b` to the next; 0 for `n`.
    pub ldb: i64,
    /// Factor of `c`.
    pub beta: f32,
    /// Numbers that the product is added to. Needed when `beta` is not 0, and not read when it is.
    pub c: Option<Tensor>,
    /// Elements from one row of `c` to the next; 0 for `n`.
    pub ldc: i64,
}

impl Sgemm {
    /// `a * b` for dense matrices that say their sizes: `f32[m, k]` and `f32[k, n]`.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for tensors that are no matrices or do not fit together.
    pub fn new(a: Tensor, b: Tensor) -> Result<Self, Error> {
        let refuse = |path: &str, expected: String, tensor: &Tensor| {
            Err(Error::field(format!("{path}.shape"), expected, format!("{:?}", tensor.shape)))
        };
        let &[m, k] = a.shape.as_slice() else { return refuse("matrices[0]", "[m, k]".into(), &a) };
        match *b.shape.as_slice() {
            [rows, n] if rows == k => {
                Ok(Self { m, n, k, alpha: 1.0, a, lda: 0, b, ldb: 0, beta: 0.0, c: None, ldc: 0 })
            }
            _ => refuse("matrices[1]", format!("[{k}, n]"), &b),
        }
    }
}

/// What [`Session::minmax`] finds.
#[derive(Clone, Debug, PartialEq)]
pub struct Minmax {
    /// The least number of the data; +inf when it has none.
    pub min: f64,
    /// The greatest; -inf when there is none.
    pub max: f64,
    /// The data limited to the bounds.
    pub out: Tensor,
}

/// What [`Session::fpga_parallel`] computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Parallel {
    /// `a + b`, element by element.
    pub add: Tensor,
    /// `a * b`, element by element.
    pub mult: Tensor,
}

impl Session {
    /// Multiplies matrices. Returns `c`, dense, as `f32[m, n]`.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for sizes that do not fit the data, `MESSAGE_TOO_LARGE`, `BACKEND_FAILED`, `OVERLOADED`, and
    /// those of [`Client::info`](crate::Client::info).
    pub async fn sgemm(&self, product: Sgemm) -> Result<Tensor, Error> {
        let Sgemm { m, n, k, alpha, a, lda, b, ldb, beta, c, ldc } = product;
        let mut matrices = vec![named("a", a), named("b", b)];
        // What is not read need not travel.
        matrices.extend(c.filter(|_| beta != 0.0).map(|c| named("c", c)));
        let request = SgemmRequest { m, n, k, alpha, lda, ldb, beta, ldc, matrices };
        request.product()?;
        match self.operate(Op::Sgemm(request)).await?.outcome {
            Some(Outcome::Sgemm(reply)) => {
                let [c] = tensors("sgemm", ["c"], DType::F32, &reply.matrices)?;
                if c.shape == [m, n] { Ok(c) } else { Err(malformed("sgemm")) }
            }
            _ => Err(malformed("sgemm")),
        }
    }

    /// `a * b + c` of `f32[m, k]`, `f32[k, n]` and `f32[m, n]`.
    ///
    /// # Errors
    /// Those of [`Session::sgemm`].
    pub async fn torch_sgemm(&self, a: Tensor, b: Tensor, c: Tensor) -> Result<Tensor, Error> {
        let request = TorchSgemmRequest { tensors: vec![named("a", a), named("b", b), named("c", c)] };
        request.product()?;
        match self.operate(Op::TorchSgemm(request)).await?.outcome {
            Some(Outcome::TorchSgemm(reply)) => one("torch_sgemm", "out", DType::F32, &reply.tensors),
            _ => Err(malformed("torch_sgemm")),
        }
    }

    /// The least and the greatest number of f64 `data`, and the data limited to `low` and `high`.
    ///
    /// # Errors
    /// Those of [`Session::sgemm`].
    pub async fn minmax(&self, data: Tensor, low: i32, high: i32) -> Result<Minmax, Error> {
        let tensors = vec![named("data", data)];
        let request = MinmaxRequest { low_threshold: low, high_threshold: high, tensors };
        request.data()?;
        match self.operate(Op::Minmax(request)).await?.outcome {
            Some(Outcome::Minmax(reply)) => {
                let out = one("minmax", "out", DType::F64, &reply.tensors)?;
                Ok(Minmax { min: reply.min, max: reply.max, out })
            }
            _ => Err(malformed("minmax")),
        }
    }

    /// A copy of an i32 array.
    ///
    /// # Errors
    /// Those of [`Session::sgemm`].
    pub async fn fpga_arraycopy(&self, a: Tensor) -> Result<Tensor, Error> {
        let request = FpgaArraycopyRequest { tensors: vec![named("a", a)] };
        request.array()?;
        match self.operate(Op::FpgaArraycopy(request)).await?.outcome {
            Some(Outcome::FpgaArraycopy(reply)) => one("fpga_arraycopy", "out", DType::I32, &reply.tensors),
            _ => Err(malformed("fpga_arraycopy")),
        }
    }

    /// `a * b` of square matrices of f32: `[n, n]`, or flat.
    ///
    /// # Errors
    /// Those of [`Session::sgemm`].
    pub async fn fpga_mmult(&self, a: Tensor, b: Tensor) -> Result<Tensor, Error> {
        let request = FpgaMmultRequest { tensors: vec![named("a", a), named("b", b)] };
        // Whether they are square is for the agent: its noop engine does not mind.
        request.arrays()?;
        match self.operate(Op::FpgaMmult(request)).await?.outcome {
            Some(Outcome::FpgaMmult(reply)) => one("fpga_mmult", "c", DType::F32, &reply.tensors),
            _ => Err(malformed("fpga_mmult")),
        }
    }

    /// Sums and products of the elements of two f32 arrays of one shape.
    ///
    /// # Errors
    /// Those of [`Session::sgemm`].
    pub async fn fpga_parallel(&self, a: Tensor, b: Tensor) -> Result<Parallel, Error> {
        let request = FpgaParallelRequest { tensors: vec![named("a", a), named("b", b)] };
        request.arrays()?;
        match self.operate(Op::FpgaParallel(request)).await?.outcome {
            Some(Outcome::FpgaParallel(reply)) => {
                let [add, mult] = tensors("fpga_parallel", ["add", "mult"], DType::F32, &reply.tensors)?;
                Ok(Parallel { add, mult })
            }
            _ => Err(malformed("fpga_parallel")),
        }
    }

    /// Sums of the elements of two f32 arrays of one shape.
    ///
    /// # Errors
    /// Those of [`Session::sgemm`].
    pub async fn fpga_vectoradd(&self, a: Tensor, b: Tensor) -> Result<Tensor, Error> {
        let request = FpgaVectoraddRequest { tensors: vec![named("a", a), named("b", b)] };
        request.arrays()?;
        match self.operate(Op::FpgaVectoradd(request)).await?.outcome {
            Some(Outcome::FpgaVectoradd(reply)) => one("fpga_vectoradd", "c", DType::F32, &reply.tensors),
            _ => Err(malformed("fpga_vectoradd")),
        }
    }

    /// A function of OpenCV on a u8 image, `[height, width, channels]` or `[height, width]`, with its parameters by
    /// name. The agent knows which functions there are; a wrong name is answered with the list.
    ///
    /// # Errors
    /// Those of [`Session::sgemm`].
    pub async fn opencv(
        &self,
        function: &str,
        parameters: &[(&str, f64)],
        image: Tensor,
    ) -> Result<Tensor, Error> {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let tensors = vec![named("image", image)];
        arrange("tensors", &["image"], DType::U8, &tensors)?;
        let request = OpencvRequest { function: function.into(), parameters, tensors };
        match self.operate(Op::Opencv(request)).await?.outcome {
            Some(Outcome::Opencv(reply)) => {
                // Slopes come as i16, everything else as bytes.
                let slopes = reply
                    .tensors
                    .iter()
                    .flat_map(|image| &image.tensor)
                    .any(|image| image.dtype() == DType::I16);
                let dtype = if slopes { DType::I16 } else { DType::U8 };
                one("opencv", "image", dtype, &reply.tensors)
            }
            _ => Err(malformed("opencv")),
        }
    }

    /// Keeps one of the agent's processors busy, for whole milliseconds up to 300,000.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a longer time, `DEADLINE`, and those of [`Client::info`](crate::Client::info).
    pub async fn mbench(&self, time: Duration) -> Result<(), Error> {
        let milliseconds = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        let request = MbenchRequest { milliseconds };
        request.check()?;
        match self.operate(Op::Mbench(request)).await?.outcome {
            Some(Outcome::Mbench(_)) => Ok(()),
            _ => Err(malformed("mbench")),
        }
    }
}

/// The tensors of a reply, in the order of the names.
fn tensors<const N: usize>(
    operation: &str,
    names: [&str; N],
    dtype: DType,
    tensors: &[NamedTensor],
) -> Result<[Tensor; N], Error> {
    let given = arrange("reply", &names, dtype, tensors).map_err(|_| malformed(operation))?;
    // The pad served its purpose, and equal results are to be equal.
    let bare = |tensor: &Tensor| Tensor { pad: Bytes::new(), ..tensor.clone() };
    let tensors: Vec<Tensor> = given.into_iter().map(|given| bare(given.tensor)).collect();
    tensors.try_into().map_err(|_| malformed(operation))
}

fn one(operation: &str, name: &str, dtype: DType, given: &[NamedTensor]) -> Result<Tensor, Error> {
    tensors(operation, [name], dtype, given).map(|[tensor]| tensor)
}
