//! The numeric operations' arguments: which tensors a request must have, and what their sizes mean. A client checks
//! with these before it sends, the agent before it computes.
//!
//! Every size comes from a guest: it is multiplied only with checks, and compared with the data before anything is
//! computed from it.

use crate::error::{Error, shown};
use crate::limits::MBENCH_MS_MAX;
use crate::tensor::check_named;
use crate::v1::{
    DType, FpgaArraycopyRequest, FpgaMmultRequest, FpgaParallelRequest, FpgaVectoraddRequest, MbenchRequest,
    MinmaxRequest, NamedTensor, SgemmRequest, Tensor, TorchSgemmRequest,
};

/// One tensor of a request, checked in itself.
#[derive(Clone, Debug)]
pub struct Given<'a> {
    /// Where it is in the request, for errors.
    pub path: String,
    /// The tensor.
    pub tensor: &'a Tensor,
    /// Its elements.
    pub count: usize,
}

/// The tensors in the order of `names`: all given by name, or with empty names by position.
///
/// # Errors
/// `BAD_ARGUMENT` naming the field under `path` for another number of tensors, a name that is not expected or comes
/// twice, another type, or sizes that do not fit each other.
pub fn arrange<'a>(
    path: &str,
    names: &[&str],
    dtype: DType,
    tensors: &'a [NamedTensor],
) -> Result<Vec<Given<'a>>, Error> {
    check_named(path, tensors)?;
    if tensors.len() != names.len() {
        return Err(Error::field(
            path,
            format!("{} tensors ({})", names.len(), names.join(", ")),
            tensors.len(),
        ));
    }
    let by_position = tensors.iter().all(|named| named.name.is_empty());
    let mut arranged: Vec<Option<Given<'a>>> = vec![None; names.len()];
    for (index, named) in tensors.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let place = if by_position { Some(index) } else { names.iter().position(|name| *name == named.name) };
        let Some(place) = place else {
            let expected = format!("one of {}, each once", names.join(", "));
            return Err(Error::field(format!("{path}.name"), expected, shown(&named.name)));
        };
        let Some(tensor) = &named.tensor else { return Err(Error::field(path, "a tensor", "none")) };
        if tensor.dtype() != dtype {
            let expected = format!("{} for {}", dtype.name(), names[place]);
            return Err(Error::field(format!("{path}.dtype"), expected, tensor.signature()));
        }
        let count = tensor.check(&path)?;
        let name = format!("{path}.name");
        if arranged[place].replace(Given { path, tensor, count }).is_some() {
            return Err(Error::field(name, "each tensor once", shown(&named.name)));
        }
    }
    // As many tensors as names and none twice: every place is filled.
    Ok(arranged.into_iter().flatten().collect())
}

/// How a row-major matrix lies in a list of numbers: `rows` rows of `columns` numbers, each beginning `stride`
/// numbers after the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Rows.
    pub rows: usize,
    /// Numbers in a row.
    pub columns: usize,
    /// Numbers from the beginning of one row to the next, at least `columns`.
    pub stride: usize,
}

impl Layout {
    /// A matrix whose rows follow each other without gaps.
    pub fn dense(rows: usize, columns: usize) -> Self {
        Self { rows, columns, stride: columns }
    }

    /// As BLAS gives it, with a stride of 0 for a dense one. A matrix of less than two rows has no use for its
    /// stride, which then says nothing and is forgotten.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` at `path` for a negative stride, or one below the length of a row.
    pub fn strided(path: &str, rows: usize, columns: usize, stride: i64) -> Result<Self, Error> {
        let dense = Self::dense(rows, columns);
        match usize::try_from(stride) {
            Ok(0) => Ok(dense),
            Ok(given) if given >= columns => {
                Ok(if rows < 2 { dense } else { Self { stride: given, ..dense } })
            }
            _ => {
                let expected = format!("0 for dense rows, or at least the {columns} elements of a row");
                Err(Error::field(path, expected, stride))
            }
        }
    }

    /// Numbers from the first of the matrix to the last; none when they cannot be counted.
    pub fn span(self) -> Option<usize> {
        if self.rows == 0 || self.columns == 0 {
            return Some(0);
        }
        (self.rows - 1).checked_mul(self.stride)?.checked_add(self.columns)
    }
}

/// A matrix of f32 that has all numbers its layout reaches.
#[derive(Clone, Debug)]
pub struct Matrix<'a> {
    /// The numbers.
    pub tensor: &'a Tensor,
    /// Where they are.
    pub layout: Layout,
}

impl<'a> Matrix<'a> {
    fn new(given: &Given<'a>, layout: Layout) -> Result<Self, Error> {
        if layout.span().is_some_and(|span| span <= given.count) {
            return Ok(Self { tensor: given.tensor, layout });
        }
        let Layout { rows, columns, stride } = layout;
        let apart = if stride == columns { String::new() } else { format!(", {stride} apart") };
        let needed = layout.span().map_or("more than can be counted".to_owned(), |span| span.to_string());
        let expected = format!("{needed} elements for {rows} rows of {columns}{apart}");
        Err(Error::field(format!("{}.data", given.path), expected, given.count))
    }
}

/// `alpha * a * b + beta * c` with everything checked.
#[derive(Clone, Debug)]
pub struct Product<'a> {
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of `c`; when it is 0, `c` is not read.
    pub beta: f32,
    /// m by k.
    pub a: Matrix<'a>,
    /// k by n.
    pub b: Matrix<'a>,
    /// m by n, if it came; it did when `beta` is not 0.
    pub c: Option<Matrix<'a>>,
}

impl Product<'_> {
    /// Shape of the result.
    pub fn shape(&self) -> (usize, usize) {
        (self.a.layout.rows, self.b.layout.columns)
    }

    /// Bytes of it, as far as they can be counted.
    pub fn result_bytes(&self) -> u64 {
        let (rows, columns) = self.shape();
        (rows as u64).saturating_mul(columns as u64).saturating_mul(DType::F32.size() as u64)
    }
}

impl SgemmRequest {
    /// The product that is asked for.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` with the field for a size or stride that is negative, too small, or more than the data has, and
    /// for wrong tensors.
    pub fn product(&self) -> Result<Product<'_>, Error> {
        let size = |path: &str, value: i64| {
            usize::try_from(value).map_err(|_| Error::field(path, "a size of 0 or more", value))
        };
        let (m, n, k) = (size("m", self.m)?, size("n", self.n)?, size("k", self.k)?);
        let a = Layout::strided("lda", m, k, self.lda)?;
        let b = Layout::strided("ldb", k, n, self.ldb)?;
        let c = Layout::strided("ldc", m, n, self.ldc)?;
        // A caller of BLAS always has a `c`, even one that is only written to.
        let names =
            if self.beta == 0.0 && self.matrices.len() == 2 { &["a", "b"][..] } else { &["a", "b", "c"] };
        let given = arrange("matrices", names, DType::F32, &self.matrices)?;
        Ok(Product {
            alpha: self.alpha,
            beta: self.beta,
            a: Matrix::new(&given[0], a)?,
            b: Matrix::new(&given[1], b)?,
            c: given.get(2).map(|given| Matrix::new(given, c)).transpose()?,
        })
    }
}

impl TorchSgemmRequest {
    /// The product that is asked for.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` with the field for tensors that are not matrices or do not fit together, and for wrong tensors.
    pub fn product(&self) -> Result<Product<'_>, Error> {
        let given = arrange("tensors", &["a", "b", "c"], DType::F32, &self.tensors)?;
        let &[m, k] = given[0].tensor.shape.as_slice() else {
            return Err(misshapen(&given[0], "[m, k]"));
        };
        let &[rows, n] = given[1].tensor.shape.as_slice() else {
            return Err(misshapen(&given[1], &format!("[{k}, n]")));
        };
        if rows != k {
            return Err(misshapen(&given[1], &format!("[{k}, n]")));
        }
        if given[2].tensor.shape != [m, n] {
            return Err(misshapen(&given[2], &format!("[{m}, {n}]")));
        }
        // The shapes are checked already: nothing is negative.
        let size = |size: i64| usize::try_from(size).unwrap_or_default();
        let (m, n, k) = (size(m), size(n), size(k));
        Ok(Product {
            alpha: 1.0,
            beta: 1.0,
            a: Matrix::new(&given[0], Layout::dense(m, k))?,
            b: Matrix::new(&given[1], Layout::dense(k, n))?,
            c: Some(Matrix::new(&given[2], Layout::dense(m, n))?),
        })
    }
}

fn misshapen(given: &Given<'_>, expected: &str) -> Error {
    Error::field(format!("{}.shape", given.path), expected, format!("{:?}", given.tensor.shape))
}

/// Two tensors of one type and shape, `a` and `b`.
fn alike(tensors: &[NamedTensor]) -> Result<[&Tensor; 2], Error> {
    let given = arrange("tensors", &["a", "b"], DType::F32, tensors)?;
    if given[1].tensor.shape != given[0].tensor.shape {
        return Err(misshapen(&given[1], &format!("the shape of a, {:?}", given[0].tensor.shape)));
    }
    Ok([given[0].tensor, given[1].tensor])
}

impl MinmaxRequest {
    /// The data.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` with the field for bounds in the wrong order and for a wrong tensor.
    pub fn data(&self) -> Result<&Tensor, Error> {
        if self.low_threshold > self.high_threshold {
            let expected = format!("at most high_threshold, {}", self.high_threshold);
            return Err(Error::field("low_threshold", expected, self.low_threshold));
        }
        let given = arrange("tensors", &["data"], DType::F64, &self.tensors)?;
        Ok(given[0].tensor)
    }
}

impl FpgaArraycopyRequest {
    /// The array.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` with the field for a wrong tensor.
    pub fn array(&self) -> Result<&Tensor, Error> {
        let given = arrange("tensors", &["a"], DType::I32, &self.tensors)?;
        Ok(given[0].tensor)
    }
}

impl FpgaMmultRequest {
    /// Both arrays, of one shape.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` with the field for wrong tensors.
    pub fn arrays(&self) -> Result<[&Tensor; 2], Error> {
        alike(&self.tensors)
    }

    /// The product that is asked for.
    ///
    /// # Errors
    /// Those of [`Self::arrays`], and `BAD_ARGUMENT` for arrays that are not square matrices.
    pub fn product(&self) -> Result<Product<'_>, Error> {
        let given = arrange("tensors", &["a", "b"], DType::F32, &self.tensors)?;
        self.arrays()?;
        let side = given[0].count.isqrt();
        let flat = given[0].tensor.shape.len() == 1 && side * side == given[0].count;
        let square = matches!(given[0].tensor.shape.as_slice(), &[rows, columns] if rows == columns);
        if !flat && !square {
            return Err(misshapen(&given[0], "a square matrix, [n, n] or its n * n elements row by row"));
        }
        let layout = Layout::dense(side, side);
        let (a, b) = (Matrix::new(&given[0], layout)?, Matrix::new(&given[1], layout)?);
        Ok(Product { alpha: 1.0, beta: 0.0, a, b, c: None })
    }
}

impl FpgaParallelRequest {
    /// Both arrays, of one shape.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` with the field for wrong tensors.
    pub fn arrays(&self) -> Result<[&Tensor; 2], Error> {
        alike(&self.tensors)
    }
}

impl FpgaVectoraddRequest {
    /// Both arrays, of one shape.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` with the field for wrong tensors.
    pub fn arrays(&self) -> Result<[&Tensor; 2], Error> {
        alike(&self.tensors)
    }
}

impl MbenchRequest {
    /// Checks the time.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for more than [`MBENCH_MS_MAX`].
    pub fn check(&self) -> Result<(), Error> {
        if self.milliseconds > MBENCH_MS_MAX {
            return Err(Error::field("milliseconds", format!("at most {MBENCH_MS_MAX}"), self.milliseconds));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
