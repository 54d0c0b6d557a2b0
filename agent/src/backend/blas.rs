//! Matrix products: on the processor, or on a device that somebody asked for or that is worth the way. Operations name
//! [`Blas`] and nothing behind it.
//!
//! The processor's kernels are those of the `gemm` crate, chosen for it at run time; it takes pointers and strides,
//! which makes this file one of the few with `unsafe`. Large products are computed by threads that all lanes share,
//! in blocks that are short enough to stop between two of them.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use gemm::Parallelism;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use vaccel_proto::compute::{Layout, Product};
use vaccel_proto::{Error, Reason};

use super::CPU;
use super::cuda::{self, Cuda, Device};
use crate::quota::Account;
use crate::scheduler::Cancel;
use crate::shared::Room;

/// Multiplications of one block, after which a product looks whether it is still wanted: 15 ms on two new cores, and
/// still 100 ms at 20 GFLOP/s, which is what an old core does.
const BLOCK_MULTIPLICATIONS: usize = 1 << 30;

/// Depth of a block of a product that needs more than one. The kernels cut the depth to less than this themselves, so
/// that cutting here first costs nothing, and every number is packed as often as without blocks.
const BLOCK_DEPTH: usize = 512;

/// Fewest rows of such a block: the kernels' own unit. With [`BLOCK_DEPTH`] and the widest matrix that a message can
/// carry these are half of [`BLOCK_MULTIPLICATIONS`].
const BLOCK_ROWS_MIN: usize = 64;

/// Multiplications below which waking the other threads takes longer than the product: 20 µs of one core.
const PARALLEL_MULTIPLICATIONS_MIN: usize = 1 << 21;

/// Multiplications from which a product goes to a device that nobody asked for, when each number that is carried there
/// and back is also used [`DEVICE_USES_MIN`] times. Below, the way takes longer than what it saves: by the figures of
/// buses and devices, for a product of this size takes 0.4 ms on a good processor and its way half of that.
const DEVICE_MULTIPLICATIONS_MIN: usize = 1 << 27;
const DEVICE_USES_MIN: usize = 64;

/// Numbers from which more than one thread copies: what a core copies in 30 µs.
const PARALLEL_COPY_NUMBERS_MIN: usize = 1 << 16;

/// Computes products with the agent's number of threads, or on its devices.
pub(crate) struct Blas {
    threads: usize,
    /// Made by the first large product.
    pool: OnceLock<Result<ThreadPool, String>>,
    cuda: Arc<Cuda>,
}

/// Where a product is computed, and for whom.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Empty where its size decides.
    pub(crate) device: String,
    pub(crate) account: Arc<Account>,
    /// Memory that the caller shares, if matrices lie there or may go there.
    pub(crate) room: Option<Arc<Room>>,
}

/// One factor: at least as many numbers as its layout reaches.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    pub(super) numbers: &'a [f32],
    pub(super) layout: Layout,
}

impl std::fmt::Debug for Blas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blas").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl Blas {
    pub(crate) fn new(threads: usize, cuda: Arc<Cuda>) -> Self {
        Self { threads, pool: OnceLock::new(), cuda }
    }

    /// The numbers of `alpha * a * b + beta * c`, dense. As in BLAS, factors of 0 hide what they multiply: with `alpha`
    /// 0 neither `a` nor `b` is read, with `beta` 0 `c` is not.
    ///
    /// # Errors
    /// `CANCELLED` when nobody waits any more, `BACKEND_FAILED` when there can be no threads; on a device that was
    /// asked for, as [`Cuda::multiply`].
    pub(crate) fn multiply(
        &self,
        product: &Product<'_>,
        place: &Place,
        cancel: &Cancel,
    ) -> Result<Bytes, Error> {
        let (m, n) = product.shape();
        let k = product.a.layout.columns;
        let c = product.c.as_ref().filter(|_| product.beta != 0.0);
        let begin = || match c {
            Some(c) => Ok(dense(&c.tensor.elements::<f32>()?, c.layout)),
            None => Ok::<_, Error>(vec![0.0; m * n]),
        };
        if product.alpha == 0.0 || m * n * k == 0 {
            let mut sum = begin()?;
            if c.is_some() {
                sum.iter_mut().for_each(|number| *number *= product.beta);
            }
            return Ok(bytes(sum));
        }
        let (a, b) = (product.a.tensor.elements::<f32>()?, product.b.tensor.elements::<f32>()?);
        let a = Factor { numbers: &a, layout: product.a.layout };
        let b = Factor { numbers: &b, layout: product.b.layout };
        let scales = (product.alpha, if c.is_some() { product.beta } else { 0.0 });
        if let Some(device) = self.device(place, [m, n, k])? {
            match self.on_device(device, &begin, scales, [a, b], place, cancel) {
                Err(error) if place.device.is_empty() && error.reason() != Reason::Cancelled => {
                    // Nobody asked for the device.
                    tracing::debug!(device = device.description.name, %error, "the processor multiplies");
                }
                computed => return computed,
            }
        }
        let mut sum = begin()?;
        if self.threads > 1 && m.saturating_mul(n).saturating_mul(k) >= PARALLEL_MULTIPLICATIONS_MIN {
            let parallelism = Parallelism::Rayon(self.threads);
            self.pool()?.install(|| add_product(&mut sum, scales, [a, b], parallelism, cancel))?;
        } else {
            add_product(&mut sum, scales, [a, b], Parallelism::None, cancel)?;
        }
        Ok(bytes(sum))
    }

    /// The device for a product of these sizes; none for the processor.
    fn device(&self, place: &Place, [m, n, k]: [usize; 3]) -> Result<Option<&Device>, Error> {
        match place.device.as_str() {
            CPU => Ok(None),
            "" => {
                let multiplications = m.saturating_mul(n).saturating_mul(k);
                // What came in messages can be counted.
                let carried = m * k + k * n + m * n;
                let is_worth_it = multiplications >= DEVICE_MULTIPLICATIONS_MIN
                    && multiplications / carried >= DEVICE_USES_MIN
                    && n.max(k) <= cuda::ROW_NUMBERS_MAX;
                Ok(self.cuda.devices().first().filter(|_| is_worth_it))
            }
            name => self.cuda.device(name).map(Some),
        }
    }

    /// `begin` makes what the product is added to.
    fn on_device(
        &self,
        device: &Device,
        begin: &dyn Fn() -> Result<Vec<f32>, Error>,
        (alpha, beta): (f32, f32),
        [a, b]: [Factor<'_>; 2],
        place: &Place,
        cancel: &Cancel,
    ) -> Result<Bytes, Error> {
        let pool = if self.threads > 1 { Some(self.pool()?) } else { None };
        let gather = |part: Factor<'_>, stage: &mut [f32]| match pool {
            Some(pool) if stage.len() >= PARALLEL_COPY_NUMBERS_MIN => pool.install(|| {
                let rows = part.numbers.par_chunks(part.layout.stride);
                stage.par_chunks_mut(part.layout.columns).zip(rows).for_each(copy_row);
            }),
            _ => stage
                .chunks_mut(part.layout.columns)
                .zip(part.numbers.chunks(part.layout.stride))
                .for_each(copy_row),
        };
        let asked = cuda::Asked { account: Some(&place.account), gather: &gather, cancel };
        let factors = cuda::Factors { a, b, alpha, beta };
        let room = place.room.as_deref().inspect(|room| self.cuda.offer(room.mapping()));
        let product_bytes = a.layout.rows * b.layout.columns * size_of::<f32>();
        if let Some((view, held)) =
            room.filter(|_| beta == 0.0).and_then(|room| self.there(device, room, product_bytes))
        {
            self.cuda.multiply(device, cuda::Sum::There(held), &factors, &asked)?;
            return Ok(view);
        }
        let mut sum = begin()?;
        self.cuda.multiply(device, cuda::Sum::Here(&mut sum), &factors, &asked)?;
        Ok(bytes(sum))
    }

    /// A place of the reply's room that a device reaches, and what will be seen there.
    fn there(&self, device: &Device, room: &Room, bytes: usize) -> Option<(Bytes, cuda::Held)> {
        let part = room.take(bytes)?;
        let held = self.cuda.held(device, room.mapping().pointer(&part)?)?;
        Some((room.mapping().view(part)?, held))
    }

    fn pool(&self) -> Result<&ThreadPool, Error> {
        let made = self.pool.get_or_init(|| {
            let builder = ThreadPoolBuilder::new().num_threads(self.threads);
            builder.thread_name(|index| format!("blas-{index}")).build().map_err(|error| error.to_string())
        });
        let message = "the agent has no threads for matrix products; its log says why";
        made.as_ref().map_err(|why| Error::new(Reason::BackendFailed, message).caused_by(why.clone()))
    }
}

/// Numbers as the bytes of a tensor, where they are.
pub(crate) fn bytes(numbers: Vec<f32>) -> Bytes {
    struct Numbers(Vec<f32>);

    impl AsRef<[u8]> for Numbers {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }

    Bytes::from_owner(Numbers(numbers))
}

/// Copies a row without what comes after it.
fn copy_row((to, from): (&mut [f32], &[f32])) {
    to.copy_from_slice(&from[..to.len()]);
}

/// The numbers of a matrix without what is between its rows.
pub(crate) fn dense(numbers: &[f32], layout: Layout) -> Vec<f32> {
    let Layout { rows, columns, stride } = layout;
    let mut dense = Vec::with_capacity(rows * columns);
    if columns > 0 {
        for row in numbers.chunks(stride).take(rows) {
            dense.extend_from_slice(&row[..columns]);
        }
    }
    dense
}

/// Adds `alpha * a * b` to `beta` times the sum, block by block.
fn add_product(
    sum: &mut [f32],
    (alpha, beta): (f32, f32),
    [a, b]: [Factor<'_>; 2],
    parallelism: Parallelism,
    cancel: &Cancel,
) -> Result<(), Error> {
    let (m, n, k) = (a.layout.rows, b.layout.columns, a.layout.columns);
    let whole = m.saturating_mul(n).saturating_mul(k) <= BLOCK_MULTIPLICATIONS;
    let depth = if whole { k } else { BLOCK_DEPTH };
    let rows = if whole { m } else { (BLOCK_MULTIPLICATIONS / (BLOCK_DEPTH * n)).max(BLOCK_ROWS_MIN) };
    for (from, sum) in (0..m).step_by(rows).zip(sum.chunks_mut(rows * n)) {
        for deep in (0..k).step_by(depth) {
            cancel.check()?;
            let (rows, depth) = (rows.min(m - from), depth.min(k - deep));
            let a = a.part(from, deep, rows, depth);
            let b = b.part(deep, 0, depth, n);
            add_block(&mut *sum, (alpha, if deep == 0 { beta } else { 1.0 }), [a, b], parallelism);
        }
    }
    Ok(())
}

impl Factor<'_> {
    /// The part of a matrix that begins at a row and column.
    pub(super) fn part(self, row: usize, column: usize, rows: usize, columns: usize) -> Self {
        let layout = Layout { rows, columns, ..self.layout };
        Self { numbers: &self.numbers[row * self.layout.stride + column..], layout }
    }
}

fn signed(stride: usize) -> isize {
    isize::try_from(stride).expect("no more than the numbers of a slice")
}

#[allow(unsafe_code, reason = "the kernels take pointers and strides")]
fn add_block(sum: &mut [f32], (alpha, beta): (f32, f32), [a, b]: [Factor<'_>; 2], parallelism: Parallelism) {
    let (m, k, n) = (a.layout.rows, a.layout.columns, b.layout.columns);
    // A mistake of ours would read or write what is not ours.
    assert_eq!(b.layout.rows, k, "the factors fit");
    assert_eq!(Some(sum.len()), m.checked_mul(n), "the sum is dense");
    for factor in [a, b] {
        assert!(factor.layout.stride >= factor.layout.columns, "rows do not overlap");
        assert!(factor.layout.span().is_some_and(|span| span <= factor.numbers.len()), "a factor is whole");
    }
    let (a_stride, b_stride, sum_stride) = (signed(a.layout.stride), signed(b.layout.stride), signed(n));
    // SAFETY: the kernel reads m rows of k numbers, `a_stride` apart, and k rows of n numbers, `b_stride` apart; it
    // reads (when told to, for every `beta` but 0) and writes m rows of n numbers. The assertions above hold all of
    // them inside the three slices, which are initialised; `sum` is borrowed mutably, so nothing else sees it and it
    // overlaps neither factor.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            sum.as_mut_ptr(),
            1,
            sum_stride,
            beta != 0.0,
            a.numbers.as_ptr(),
            1,
            a_stride,
            b.numbers.as_ptr(),
            1,
            b_stride,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, DeviceConfig, Settings};
    use crate::identity::Tenant;
    use crate::quota::Accounts;
    use vaccel_proto::v1::{NamedTensor, SgemmRequest, Tensor};

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        // A linear congruential generator: the same numbers everywhere, in [-1, 1).
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from(u16::try_from(state >> 16).expect("16 bits")) / 32768.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn flat(numbers: &[f32]) -> NamedTensor {
        let shape = [i64::try_from(numbers.len()).expect("short")];
        NamedTensor { name: String::new(), tensor: Some(Tensor::new(&shape, numbers).expect("valid")) }
    }

    fn request(sizes: [usize; 3], gaps: [usize; 3], scales: (f32, f32)) -> (SgemmRequest, [Vec<f32>; 3]) {
        let [m, n, k] = sizes;
        let [lda, ldb, ldc] = [k + gaps[0], n + gaps[1], n + gaps[2]];
        let of = |rows: usize, stride: usize, seed| numbers(rows * stride, seed);
        let data = [of(m, lda, 1), of(k, ldb, 2), of(m, ldc, 3)];
        let int = |size: usize| i64::try_from(size).expect("small");
        let request = SgemmRequest {
            m: int(m),
            n: int(n),
            k: int(k),
            alpha: scales.0,
            lda: int(lda),
            ldb: int(ldb),
            beta: scales.1,
            ldc: int(ldc),
            matrices: data.iter().map(|data| flat(data)).collect(),
        };
        (request, data)
    }

    /// The same in f64, and for each number how much larger the sum of its absolute terms is: rounding errors are of
    /// that size.
    fn reference(request: &SgemmRequest, [a, b, c]: &[Vec<f32>; 3]) -> Vec<(f64, f64)> {
        let size = |size: i64| usize::try_from(size).expect("positive");
        let (alpha, beta) = (f64::from(request.alpha), f64::from(request.beta));
        let at = |data: &[f32], stride: i64, row: usize, column: usize| {
            f64::from(data[row * size(stride) + column])
        };
        let cells =
            (0..size(request.m)).flat_map(|row| (0..size(request.n)).map(move |column| (row, column)));
        let cell = |(row, column)| {
            let terms = (0..size(request.k))
                .map(|depth| alpha * at(a, request.lda, row, depth) * at(b, request.ldb, depth, column));
            let own = if beta == 0.0 { 0.0 } else { beta * at(c, request.ldc, row, column) };
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + f64::abs(term)));
            (sum + own, size + own.abs())
        };
        cells.map(cell).collect()
    }

    /// A processor without devices.
    fn cpu(threads: usize) -> Blas {
        let libraries = vec!["/absent".into()];
        Blas::new(threads, Arc::new(Cuda::find(&DeviceConfig { libraries, ..DeviceConfig::default() })))
    }

    fn anywhere() -> Place {
        let limits = Config::new(Settings::default()).expect("valid").tenant;
        let account = Accounts::new(limits, |_| 1).of(&Tenant::new("a"));
        Place { device: String::new(), account, room: None }
    }

    fn multiply(blas: &Blas, request: &SgemmRequest, cancel: &Cancel) -> Result<Vec<f32>, Error> {
        let product = request.product().expect("valid");
        blas.multiply(&product, &anywhere(), cancel).map(|bytes| bytemuck::pod_collect_to_vec(&bytes))
    }

    fn check(blas: &Blas, request: &SgemmRequest, data: &[Vec<f32>; 3]) {
        let found = multiply(blas, request, &Cancel::default()).expect("computed");
        let expected = reference(request, data);
        assert_eq!(found.len(), expected.len());
        for (index, (found, (expected, size))) in found.iter().zip(expected).enumerate() {
            // At most one rounding for each term: far less is usual, none is certain.
            let tolerance = f64::from(f32::EPSILON) * (size * 8.0 + 1e-6);
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= tolerance, "{index}: {found} for {expected}, {request:?}");
        }
    }

    #[test]
    fn products_equal_a_reference_in_f64() {
        let blas = cpu(2);
        let sizes = [
            [1, 1, 1],
            [2, 3, 4],
            [1, 7, 129],
            [5, 1, 33],
            [17, 31, 1],
            [64, 64, 64],
            [65, 63, 127],
            [100, 37, 513],
            [3, 200, 1025],
            [129, 257, 64],
        ];
        for (number, size) in sizes.into_iter().enumerate() {
            for scales in [(1.0, 0.0), (1.0, 1.0), (-0.5, 2.0), (0.0, 0.5), (3.0, -1.0)] {
                for gaps in [[0, 0, 0], [3, 1, 7], [number, 16, 1]] {
                    let (request, data) = request(size, gaps, scales);
                    check(&blas, &request, &data);
                }
            }
        }
    }

    #[test]
    fn a_product_of_many_blocks_is_the_same() {
        // 1.2 times one block; the deepest block and the last rows are shorter than the others.
        let (request, data) = request([1100, 900, 1301], [1, 0, 2], (1.5, 0.5));
        const { assert!(1100 * 900 * 1301 > BLOCK_MULTIPLICATIONS) };
        for threads in [1, 3] {
            let found = multiply(&cpu(threads), &request, &Cancel::default()).expect("computed");
            let row = |row: usize| {
                let first = SgemmRequest { m: 1, ..request.clone() };
                let part = |data: &[f32], stride: i64| {
                    let stride = usize::try_from(stride).expect("positive");
                    data[row * stride..(row + 1) * stride].to_vec()
                };
                reference(
                    &first,
                    &[part(&data[0], request.lda), data[1].clone(), part(&data[2], request.ldc)],
                )
            };
            for at in [0, 1, 511, 1023, 1024, 1099] {
                for (found, (expected, size)) in found[at * 900..].iter().zip(row(at)) {
                    let error = (f64::from(*found) - expected).abs();
                    assert!(
                        error <= f64::from(f32::EPSILON) * size * 8.0,
                        "row {at}: {found} for {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn sizes_of_zero_have_the_meaning_of_blas() {
        let blas = cpu(1);
        let (mut request, data) = request([2, 3, 0], [0, 0, 0], (1.0, 0.5));
        check(&blas, &request, &data);
        request.beta = 0.0;
        let zeros = multiply(&blas, &request, &Cancel::default());
        assert_eq!(zeros.expect("computed"), [0.0; 6]);
        for sizes in [[0, 3, 2], [2, 0, 3], [0, 0, 0]] {
            let (request, _) = super::tests::request(sizes, [0, 0, 0], (1.0, 1.0));
            let nothing = multiply(&blas, &request, &Cancel::default());
            assert!(nothing.expect("computed").is_empty());
        }
    }

    #[test]
    fn factors_of_zero_hide_what_they_multiply() {
        let blas = cpu(1);
        let of = |alpha, beta, a: f32, c: f32| {
            let matrices = vec![flat(&[a, 2.0]), flat(&[3.0, 4.0]), flat(&[c])];
            let request = SgemmRequest { m: 1, n: 1, k: 2, alpha, beta, matrices, ..SgemmRequest::default() };
            multiply(&blas, &request, &Cancel::default()).expect("computed")[0]
        };
        assert_eq!(of(1.0, 0.0, 1.0, f32::NAN), 11.0);
        assert_eq!(of(0.0, 2.0, f32::NAN, 4.0), 8.0);
        assert_eq!(of(0.0, 0.0, f32::NAN, f32::NAN), 0.0);
        assert!(of(1.0, 1.0, f32::NAN, 1.0).is_nan());
        assert!(of(1.0, 1.0, 1.0, f32::NAN).is_nan());
        assert_eq!(of(1.0, 0.5, f32::INFINITY, 1.0), f32::INFINITY);
        assert!(of(1.0, 1.0, f32::INFINITY, f32::NEG_INFINITY).is_nan());
        assert!(of(f32::NAN, 0.0, 1.0, 1.0).is_nan());
    }

    #[test]
    fn not_a_number_stays_in_its_row_and_column() {
        let (sizes, blas) = ([70, 90, 50], cpu(2));
        let (mut request, mut data) = request(sizes, [2, 3, 0], (1.0, 0.0));
        data[0][33 * 52 + 7] = f32::NAN;
        data[1][12 * 93 + 41] = f32::INFINITY;
        request.matrices = data.iter().map(|data| flat(data)).collect();
        let found = multiply(&blas, &request, &Cancel::default()).expect("computed");
        for (index, number) in found.iter().enumerate() {
            let touched = index / 90 == 33 || index % 90 == 41;
            assert_eq!(number.is_finite(), !touched, "row {}, column {}", index / 90, index % 90);
        }
    }

    #[test]
    fn a_cancelled_product_stops() {
        let (request, _) = request([4, 4, 4], [0, 0, 0], (1.0, 0.0));
        let cancel = Cancel::default();
        cancel.set();
        let stopped = multiply(&cpu(1), &request, &cancel);
        assert_eq!(stopped.expect_err("cancelled").reason(), Reason::Cancelled);
    }
}
