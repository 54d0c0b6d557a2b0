//! What an output's numbers are, whatever its type and the order of its axes.

use std::borrow::Cow;

use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

/// Numbers in rows and columns.
pub(super) struct Table<'a> {
    numbers: Cow<'a, [f32]>,
    pub(super) rows: usize,
    columns: usize,
    /// Whether a column's numbers lie beside each other.
    is_turned: bool,
}

impl<'a> Table<'a> {
    /// # Errors
    /// `MODEL_REJECTED` for an output that does not have so many columns.
    pub(super) fn of(output: &'a Tensor, columns: usize) -> Result<Self, Error> {
        let refuse = || {
            let message = format!(
                "expected an output [1, rows, {columns}] or [1, {columns}, rows], this model gives {}",
                output.signature()
            );
            Error::new(Reason::ModelRejected, message)
        };
        let numbers = numbers(output)?;
        let mut shape: &[i64] = &output.shape;
        while let [1, rest @ ..] = shape
            && rest.len() >= 2
        {
            shape = rest;
        }
        let wanted = i64::try_from(columns).unwrap_or(i64::MAX);
        let is_turned = match *shape {
            [_, last] if last == wanted => false,
            [first, _] if first == wanted => true,
            [_] if columns == 1 => false,
            _ => return Err(refuse()),
        };
        let rows = numbers.len() / columns.max(1);
        Ok(Self { numbers, rows, columns, is_turned })
    }

    pub(super) fn at(&self, row: usize, column: usize) -> f32 {
        self.numbers[if self.is_turned { column * self.rows + row } else { row * self.columns + column }]
    }
}

/// An output's numbers.
///
/// # Errors
/// `MODEL_REJECTED` for other types than f32 and those of whole numbers.
pub(in crate::ops) fn numbers(output: &Tensor) -> Result<Cow<'_, [f32]>, Error> {
    #[allow(clippy::cast_precision_loss, reason = "classes, of which there are far fewer than 2^24")]
    let numbers = match output.dtype() {
        DType::F32 => output.elements::<f32>()?,
        DType::I64 => output.elements::<i64>()?.iter().map(|number| *number as f32).collect(),
        DType::I32 => output.elements::<i32>()?.iter().map(|number| *number as f32).collect(),
        DType::U8 => output.elements::<u8>()?.iter().map(|number| f32::from(*number)).collect(),
        _ => {
            let message = format!("expected an output of type f32, this model gives {}", output.signature());
            return Err(Error::new(Reason::ModelRejected, message));
        }
    };
    Ok(numbers)
}
