//! What the checks let through and what they refuse, with the field that each refusal names.

use super::*;
use crate::error::Detail;

fn f32s(name: &str, shape: &[i64]) -> NamedTensor {
    let count = shape.iter().product::<i64>();
    let tensor = Tensor::new(shape, &vec![0.5_f32; usize::try_from(count).unwrap()]).unwrap();
    NamedTensor { name: name.into(), tensor: Some(tensor) }
}

fn sgemm(sizes: [i64; 3], strides: [i64; 3], beta: f32, counts: &[i64]) -> SgemmRequest {
    let [m, n, k] = sizes;
    let [lda, ldb, ldc] = strides;
    let matrices = counts.iter().map(|count| f32s("", &[*count])).collect();
    SgemmRequest { m, n, k, alpha: 1.0, lda, ldb, beta, ldc, matrices }
}

fn field(error: &Error) -> &str {
    match error.detail() {
        Detail::Field(path) => path,
        Detail::Limit { subject, .. } => subject,
        other => panic!("{other:?}: {error}"),
    }
}

#[test]
fn sizes_and_strides_of_sgemm() {
    let max = i64::MAX;
    for (request, expected) in [
        (sgemm([2, 3, 4], [0, 0, 0], 0.0, &[8, 12]), None),
        (sgemm([2, 3, 4], [0, 0, 0], 0.0, &[8, 12, 6]), None),
        (sgemm([2, 3, 4], [0, 0, 0], 1.0, &[8, 12, 6]), None),
        // The last row needs no gap after it.
        (sgemm([2, 3, 4], [10, 7, 5], 1.0, &[14, 24, 8]), None),
        (sgemm([2, 3, 4], [10, 7, 5], 1.0, &[13, 24, 8]), Some("matrices[0].data")),
        (sgemm([2, 3, 4], [10, 7, 5], 1.0, &[14, 23, 8]), Some("matrices[1].data")),
        (sgemm([2, 3, 4], [10, 7, 5], 1.0, &[14, 24, 7]), Some("matrices[2].data")),
        (sgemm([2, 3, 4], [0, 0, 0], 1.0, &[8, 12]), Some("matrices")),
        (sgemm([2, 3, 4], [0, 0, 0], f32::NAN, &[8, 12]), Some("matrices")),
        (sgemm([2, 3, 4], [0, 0, 0], 0.0, &[8]), Some("matrices")),
        (sgemm([2, 3, 4], [0, 0, 0], 0.0, &[8, 12, 6, 1]), Some("matrices")),
        (sgemm([2, 3, 4], [0, 0, 0], 0.0, &[8, 12, 5]), Some("matrices[2].data")),
        (sgemm([-1, 3, 4], [0, 0, 0], 0.0, &[8, 12]), Some("m")),
        (sgemm([2, i64::MIN, 4], [0, 0, 0], 0.0, &[8, 12]), Some("n")),
        (sgemm([2, 3, -4], [0, 0, 0], 0.0, &[8, 12]), Some("k")),
        (sgemm([2, 3, 4], [3, 0, 0], 0.0, &[8, 12]), Some("lda")),
        (sgemm([2, 3, 4], [0, 2, 0], 0.0, &[8, 12]), Some("ldb")),
        (sgemm([2, 3, 4], [0, 0, 2], 0.0, &[8, 12]), Some("ldc")),
        (sgemm([2, 3, 4], [-4, 0, 0], 0.0, &[8, 12]), Some("lda")),
        (sgemm([2, 3, 4], [max, 0, 0], 0.0, &[8, 12]), Some("matrices[0].data")),
        (sgemm([2, 3, 4], [0, max, 0], 0.0, &[8, 12]), Some("matrices[1].data")),
        (sgemm([2, 3, 4], [0, 0, max], 1.0, &[8, 12, 6]), Some("matrices[2].data")),
        (sgemm([3, 3, max], [0, 0, 0], 0.0, &[8, 12]), Some("matrices[0].data")),
        (sgemm([max, 1, 1], [0, 0, 0], 0.0, &[8, 12]), Some("matrices[0].data")),
        (sgemm([max, max, max], [max, max, max], 1.0, &[8, 12, 6]), Some("matrices[0].data")),
        (sgemm([max, 0, max], [0, 0, 0], 0.0, &[8, 12]), Some("matrices[0].data")),
        // One row needs no stride, none of it is reached.
        (sgemm([1, 3, 4], [max, 0, max], 1.0, &[4, 12, 3]), None),
        (sgemm([0, 0, max], [0, 0, 0], 0.0, &[0, 0]), None),
        (sgemm([2, 3, 0], [0, 0, 0], 1.0, &[0, 0, 6]), None),
        (sgemm([4096, 4096, 1], [0, 0, 0], 0.0, &[4096, 4096]), None),
    ] {
        let checked = request.product().map(|product| product.shape());
        match expected {
            Some(expected) => assert_eq!(field(&checked.expect_err(expected)), expected),
            None => assert!(checked.is_ok(), "{checked:?}"),
        }
    }
}

#[test]
fn tensors_come_by_name_in_any_order_or_by_position() {
    let [a, b] = [[2, 3], [3, 2]];
    let c = [2, 2];
    let of = |tensors: [NamedTensor; 3]| TorchSgemmRequest { tensors: tensors.into() };
    for request in
        [of([f32s("", &a), f32s("", &b), f32s("", &c)]), of([f32s("c", &c), f32s("a", &a), f32s("b", &b)])]
    {
        assert_eq!(request.product().expect("fits").shape(), (2, 2));
    }
    for (request, expected) in [
        (of([f32s("a", &a), f32s("b", &b), f32s("", &c)]), "tensors[2].name"),
        (of([f32s("a", &a), f32s("b", &b), f32s("d", &c)]), "tensors[2].name"),
        (of([f32s("a", &a), f32s("b", &b), f32s("b", &b)]), "tensors[2].name"),
        (of([f32s("c", &c), f32s("b", &[2, 2]), f32s("a", &a)]), "tensors[1].shape"),
        (of([f32s("a", &[6]), f32s("b", &b), f32s("c", &c)]), "tensors[0].shape"),
        (of([f32s("a", &a), f32s("b", &[3, 2, 1]), f32s("c", &c)]), "tensors[1].shape"),
        (of([f32s("a", &a), f32s("b", &b), f32s("c", &[4])]), "tensors[2].shape"),
        (of([f32s("a", &a), f32s("b", &[2, 3]), f32s("c", &[2, 3])]), "tensors[1].shape"),
        (of([f32s("a", &[5000, 0]), f32s("b", &[0, 5000]), f32s("c", &[2, 2])]), "tensors[2].shape"),
    ] {
        assert_eq!(field(&request.product().expect_err(expected)), expected);
    }
}

#[test]
fn other_types_and_sizes_are_refused_with_the_field() {
    let f64s = |shape: &[i64]| NamedTensor {
        name: String::new(),
        tensor: Some(Tensor::from_bytes(DType::F64, shape, vec![0; 16].into())),
    };
    let minmax = |low_threshold, high_threshold, tensors: Vec<NamedTensor>| MinmaxRequest {
        low_threshold,
        high_threshold,
        tensors,
    };
    assert!(minmax(i32::MIN, i32::MAX, vec![f64s(&[2])]).data().is_ok());
    for (request, expected) in [
        (minmax(1, 0, vec![f64s(&[2])]), "low_threshold"),
        (minmax(0, 0, vec![f64s(&[3])]), "tensors[0].data"),
        (minmax(0, 0, vec![f64s(&[-2])]), "tensors[0].shape"),
        (minmax(0, 0, vec![f32s("", &[4])]), "tensors[0].dtype"),
        (minmax(0, 0, vec![]), "tensors"),
        (minmax(0, 0, vec![NamedTensor::default()]), "tensors[0].tensor"),
    ] {
        assert_eq!(field(&request.data().expect_err(expected)), expected);
    }
    let copy = FpgaArraycopyRequest { tensors: vec![f32s("a", &[2])] };
    assert_eq!(field(&copy.array().expect_err("i32")), "tensors[0].dtype");
    let add = FpgaVectoraddRequest { tensors: vec![f32s("a", &[4]), f32s("b", &[5])] };
    assert_eq!(field(&add.arrays().expect_err("lengths")), "tensors[1].shape");
    let both = FpgaParallelRequest { tensors: vec![f32s("a", &[5]), f32s("b", &[4])] };
    assert_eq!(field(&both.arrays().expect_err("lengths")), "tensors[1].shape");
    assert_eq!(field(&MbenchRequest { milliseconds: 300_001 }.check().expect_err("long")), "milliseconds");
    assert!(MbenchRequest { milliseconds: 300_000 }.check().is_ok());
}

#[test]
fn mmult_takes_square_matrices_only() {
    let of = |a: &[i64], b: &[i64]| FpgaMmultRequest { tensors: vec![f32s("", a), f32s("", b)] };
    for shape in [&[9][..], &[3, 3], &[0], &[0, 0], &[1]] {
        assert!(of(shape, shape).product().is_ok(), "{shape:?}");
    }
    for (a, b, expected) in [
        (&[5][..], &[5][..], "tensors[0].shape"),
        (&[2, 8], &[2, 8], "tensors[0].shape"),
        (&[1, 3, 3], &[1, 3, 3], "tensors[0].shape"),
        (&[], &[], "tensors[0].shape"),
        (&[9], &[3, 3], "tensors[1].shape"),
    ] {
        assert_eq!(field(&of(a, b).product().expect_err(expected)), expected);
    }
    // What needs no square.
    assert!(of(&[5], &[5]).arrays().is_ok());
}
