//! Products of matrices: by the agent's own code in this process, over the socket, and on a device without the agent.

use std::time::Instant;

use vaccel_client::{Client, Session, Sgemm, named};
use vaccel_proto::v1::{DType, SgemmRequest, Tensor};
use vaccel_proto::{Error, Reason};

use super::measure::{Amounts, CPU, by_turns, in_shared_memory, median};
use super::{Check, Product, SelfTestError};
use crate::Direct;
use crate::config::{DeviceConfig, EngineConfig};

/// A square matrix of numbers between -1 and 1 that look random.
fn matrix(side: usize, seed: usize) -> Vec<f32> {
    (0..side * side).map(|index| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
}

/// Products of one size on a device.
pub(super) async fn product(
    direct: &Direct,
    client: &Client,
    session: &Session,
    device: &str,
    side: usize,
    amounts: &Amounts,
) -> Result<Product, SelfTestError> {
    let (a, b) = (matrix(side, 1), matrix(side, 2));
    let size = i64::try_from(side).expect("a constant");
    let [left, right] = [Tensor::new(&[size, size], &a)?, Tensor::new(&[size, size], &b)?];
    let matrices = vec![named("a", left.clone()), named("b", right.clone())];
    let request = SgemmRequest { m: size, n: size, k: size, alpha: 1.0, matrices, ..SgemmRequest::default() };
    let call = async |left: &Tensor, right: &Tensor| -> Result<Tensor, Error> {
        session.sgemm(Sgemm::new(left.clone(), right.clone())?).await
    };
    let found = call(&left, &right).await?;
    let max_error = error_of(&found.elements::<f32>()?, [&a, &b], side);
    drop(found);
    let [alone, unix] = by_turns(
        amounts,
        || direct.sgemm_on(device, &request).map(drop),
        async || call(&left, &right).await.map(drop),
    )
    .await?;
    drop((left, right, request));
    let [left, right] = [in_shared_memory(client, &a).await, in_shared_memory(client, &b).await];
    let [left, right] = [left, right].map(|data| Tensor::from_bytes(DType::F32, &[size, size], data));
    // The first one tells the client how much room the reply takes.
    let found = call(&left, &right).await?;
    let max_error = max_error.max(error_of(&found.elements::<f32>()?, [&a, &b], side));
    drop(found);
    let mut shared = Vec::new();
    let begun = Instant::now();
    while shared.is_empty() || begun.elapsed() < amounts.time {
        let begun = Instant::now();
        call(&left, &right).await?;
        shared.push(begun.elapsed().as_secs_f64());
    }
    let tflops = |seconds: f64| 2.0 * (side as f64).powi(3) / seconds / 1e12;
    let bare = (device != CPU).then(|| direct.sgemm_alone(device, side)).transpose()?;
    let bare = bare.map(|bare| bare.map(|took| tflops(took.as_secs_f64())));
    Ok(Product {
        device: device.into(),
        side,
        direct_tflops: tflops(alone),
        unix_tflops: tflops(unix),
        shared_tflops: tflops(median(shared)),
        resident_tflops: bare.map(|[resident, _]| resident),
        pinned_tflops: bare.map(|[_, pinned]| pinned),
        max_error,
    })
}

/// The largest difference of some rows and columns to sums in f64, to the largest of these or 1.
fn error_of(found: &[f32], [a, b]: [&[f32]; 2], side: usize) -> f64 {
    /// Cells that are looked at in each direction, from one corner to the other.
    const CELLS: usize = 16;
    let places = || (0..CELLS).map(|cell| cell * (side - 1) / (CELLS - 1));
    let cells = places().flat_map(|row| places().map(move |column| (row, column)));
    let (mut difference, mut largest) = (0.0_f64, 1.0_f64);
    for (row, column) in cells {
        let terms =
            (0..side).map(|depth| f64::from(a[row * side + depth]) * f64::from(b[depth * side + column]));
        let expected: f64 = terms.sum();
        largest = largest.max(expected.abs());
        let off = (f64::from(found[row * side + column]) - expected).abs();
        // What is no number is as wrong as can be.
        difference = if off.is_nan() { f64::INFINITY } else { difference.max(off) };
    }
    difference / largest
}

/// That what a device has no room for is an error with figures, and that the next call goes on.
pub(super) fn containment(config: &EngineConfig, device: &str) -> Result<Check, SelfTestError> {
    /// Room for what products need for good, and for no large matrix.
    const BYTES_MAX: u64 = 160 << 20;
    const SIDE: i64 = 4096;
    let devices = DeviceConfig { bytes_max: Some(BYTES_MAX), ..config.devices.clone() };
    let small = Direct::new(&EngineConfig { devices, ..config.clone() })?;
    let zeros = |rows: i64, columns: i64| {
        let count = usize::try_from(rows * columns).expect("a constant");
        Tensor::new(&[rows, columns], &vec![0.0_f32; count])
    };
    let request = |k: i64| {
        let matrices = vec![named("a", zeros(1, k)?), named("b", zeros(k, SIDE)?)];
        Ok::<_, Error>(SgemmRequest { m: 1, n: SIDE, k, alpha: 1.0, matrices, ..SgemmRequest::default() })
    };
    let refusal = small.sgemm_on(device, &request(SIDE)?).map(drop);
    let next = small.sgemm_on(device, &request(1)?).map(drop);
    let is_refused = refusal.as_ref().is_err_and(|error| error.reason() == Reason::QuotaExceeded);
    let told =
        |outcome: Result<(), Error>| outcome.map_or_else(|error| error.to_string(), |()| "computed".into());
    Ok(Check {
        what: format!("{device} without room"),
        passed: is_refused && next.is_ok(),
        found: format!("{}; then: {}", told(refusal), told(next)),
        expected: "QUOTA_EXCEEDED with figures; then: computed".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::self_test::measure::ERROR_MAX;

    #[test]
    fn errors_are_found_wherever_they_are() {
        let side = 40;
        let (a, b) = (matrix(side, 1), matrix(side, 2));
        let cell = |row: usize, column: usize| {
            (0..side).map(|depth| a[row * side + depth] * b[depth * side + column]).sum::<f32>()
        };
        let mut found: Vec<f32> = (0..side * side).map(|index| cell(index / side, index % side)).collect();
        assert!(error_of(&found, [&a, &b], side) < 1e-6);
        found[side * side - 1] += 0.1;
        assert!(error_of(&found, [&a, &b], side) > ERROR_MAX);
        found[side * side - 1] = f32::NAN;
        assert_eq!(error_of(&found, [&a, &b], side), f64::INFINITY);
    }
}
