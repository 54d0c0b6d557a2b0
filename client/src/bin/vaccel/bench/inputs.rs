//! What every call carries: the model's inputs with random elements, the same in every run of the command.

use bytes::{BufMut, Bytes, BytesMut};
use half::{bf16, f16};
use vaccel_client::proto::limits::MESSAGE_BYTES_MAX;
use vaccel_client::proto::tensor::element_count;

use crate::args::Shape;
use crate::output::plain;

/// Any number: with the same one every run sends the same bytes.
const SEED: u64 = 0x7661_6363_656c;

/// What a model says of one of its inputs.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) datatype: String,
    /// With the batch, where the model has one; -1 is open.
    pub(crate) shape: Vec<i64>,
}

/// What a model says of itself.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) inputs: Vec<Port>,
    /// Its `max_batch_size`: 0 without a batch, none where the server does not tell.
    pub(crate) rows_max: Option<i64>,
}

/// A tensor of a call.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) name: String,
    pub(crate) datatype: String,
    pub(crate) shape: Vec<i64>,
    /// Little-endian, row by row.
    pub(crate) data: Bytes,
}

/// Makes the inputs of a call of so many rows.
///
/// # Errors
/// What is wrong with the batch or the shapes, or missing.
pub(crate) fn make(model: &Description, batch: u32, given: &[Shape]) -> Result<Vec<Input>, String> {
    check_names(model, given)?;
    let rows = rows(model, i64::from(batch))?;
    let mut random = Random(SEED);
    let mut room = MESSAGE_BYTES_MAX;
    let mut inputs = Vec::new();
    for port in &model.inputs {
        let name = plain(&port.name);
        let given = given.iter().find(|shape| shape.name == port.name).map(|shape| &shape.sizes[..]);
        let shape = shape(port, rows, given)?;
        let kind = Kind::named(&port.datatype)
            .ok_or_else(|| format!("input {name}: expected a known type, got {}", plain(&port.datatype)))?;
        let elements = element_count(&name, &shape).map_err(|error| error.to_string())?;
        let left = elements.checked_mul(kind.bytes()).and_then(|bytes| room.checked_sub(bytes));
        room = left.ok_or_else(|| {
            format!(
                "input {name}: {}{shape:?} and the others are more than the {MESSAGE_BYTES_MAX} bytes of a call; \
                 make --batch or --shape smaller",
                port.datatype
            )
        })?;
        let data = kind.fill(elements, &mut random);
        inputs.push(Input { name: port.name.clone(), datatype: port.datatype.clone(), shape, data });
    }
    Ok(inputs)
}

fn check_names(model: &Description, given: &[Shape]) -> Result<(), String> {
    for (index, shape) in given.iter().enumerate() {
        if !model.inputs.iter().any(|port| port.name == shape.name) {
            let names: Vec<String> = model.inputs.iter().map(|port| plain(&port.name)).collect();
            return Err(format!("--shape {}: expected one of {}", shape.name, names.join(", ")));
        }
        if given[..index].iter().any(|earlier| earlier.name == shape.name) {
            return Err(format!("--shape {}: expected one shape for each input, got two", shape.name));
        }
    }
    Ok(())
}

/// The first size of every input; none where the model has no batch.
fn rows(model: &Description, batch: i64) -> Result<Option<i64>, String> {
    match model.rows_max {
        Some(max) if max > 0 && batch <= max => Ok(Some(batch)),
        Some(max) if max > 0 => {
            Err(format!("--batch: expected at most {max}, the model's max_batch_size, got {batch}"))
        }
        _ if batch == 1 => Ok(None),
        what => {
            let why =
                if what.is_some() { "the model has no batch" } else { "the server tells no max_batch_size" };
            Err(format!(
                "--batch: expected 1, because {why}, got {batch}; --shape sets a first size that is open"
            ))
        }
    }
}

fn shape(port: &Port, rows: Option<i64>, given: Option<&[i64]>) -> Result<Vec<i64>, String> {
    let name = plain(&port.name);
    let own = port.shape.get(usize::from(rows.is_some())..).unwrap_or_default();
    let sizes = match given {
        Some(given) => {
            let fits = given.len() == own.len()
                && given.iter().zip(own).all(|(given, own)| *own < 0 || given == own);
            if !fits {
                return Err(format!(
                    "--shape {name}: expected sizes as in {own:?}, -1 for any, got {given:?}"
                ));
            }
            given
        }
        None if own.iter().any(|size| *size < 0) => {
            let example: Vec<String> =
                own.iter().map(|size| if *size < 0 { "N".into() } else { size.to_string() }).collect();
            let example = example.join(",");
            return Err(format!(
                "input {name} has open sizes, {own:?}: choose them with --shape {name}:{example}"
            ));
        }
        None => own,
    };
    Ok(rows.into_iter().chain(sizes.iter().copied()).collect())
}

/// Types of elements, as far as making them differs.
#[derive(Clone, Copy)]
enum Kind {
    Bool,
    Byte,
    Whole(usize),
    F16,
    Bf16,
    F32,
    F64,
    Text,
}

impl Kind {
    fn named(datatype: &str) -> Option<Self> {
        Some(match datatype {
            "BOOL" => Self::Bool,
            "UINT8" | "INT8" => Self::Byte,
            "UINT16" | "INT16" => Self::Whole(2),
            "UINT32" | "INT32" => Self::Whole(4),
            "UINT64" | "INT64" => Self::Whole(8),
            "FP16" => Self::F16,
            "BF16" => Self::Bf16,
            "FP32" => Self::F32,
            "FP64" => Self::F64,
            "BYTES" => Self::Text,
            _ => return None,
        })
    }

    /// Bytes of an element.
    fn bytes(self) -> usize {
        match self {
            Self::Bool | Self::Byte => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            // A length, and a letter.
            Self::Text => 5,
            Self::F64 => 8,
            Self::Whole(bytes) => bytes,
        }
    }

    fn fill(self, elements: usize, random: &mut Random) -> Bytes {
        let mut data = BytesMut::with_capacity(elements * self.bytes());
        for _ in 0..elements {
            match self {
                Self::Bool => data.put_u8(random.below(2)),
                Self::Byte => data.put_u8(random.below(0)),
                // Most wide integers are ids, masks and lengths: 0 and 1 are in every table.
                Self::Whole(bytes) => data.put_uint_le(u64::from(random.below(2)), bytes),
                Self::F16 => data.put_slice(&f16::from_f32(random.unit()).to_le_bytes()),
                Self::Bf16 => data.put_slice(&bf16::from_f32(random.unit()).to_le_bytes()),
                Self::F32 => data.put_f32_le(random.unit()),
                Self::F64 => data.put_f64_le(random.unit().into()),
                // A digit: text that is a number, too.
                Self::Text => {
                    data.put_u32_le(1);
                    data.put_u8(b'0' + random.below(10));
                }
            }
        }
        data.freeze()
    }
}

/// SplitMix64: <https://prng.di.unimi.it/splitmix64.c>.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// 0 to `bound - 1`; every byte for 0.
    fn below(&mut self, bound: u8) -> u8 {
        let [first, ..] = self.next().to_le_bytes();
        first.checked_rem(bound).unwrap_or(first)
    }

    /// From 0 to below 1, with as many digits as an f32 has.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(rows_max: Option<i64>, datatype: &str, shape: &[i64]) -> Description {
        let port = Port { name: "x".into(), datatype: datatype.into(), shape: shape.into() };
        Description { inputs: vec![port], rows_max }
    }

    fn sized(sizes: &[i64]) -> Vec<Shape> {
        vec![Shape { name: "x".into(), sizes: sizes.into() }]
    }

    #[test]
    fn shapes_are_the_batch_and_what_was_chosen() {
        let shape =
            |model: &Description, batch, given: &[Shape]| make(model, batch, given).unwrap()[0].shape.clone();
        let batched = model(Some(8), "FP32", &[-1, 3, -1]);
        assert_eq!(shape(&batched, 8, &sized(&[3, 5])), [8, 3, 5]);
        assert_eq!(shape(&model(Some(0), "FP32", &[2, 3]), 1, &[]), [2, 3]);
        assert_eq!(shape(&model(None, "FP32", &[-1]), 1, &sized(&[7])), [7]);
        for (model, batch, given, why) in [
            (&batched, 1, vec![], "--shape x:3,N"),
            (&batched, 9, sized(&[3, 5]), "at most 8"),
            (&batched, 1, sized(&[4, 5]), "[3, -1]"),
            (&batched, 1, sized(&[3]), "got [3]"),
            (&batched, 1, [sized(&[3, 5]), sized(&[3, 5])].concat(), "got two"),
            (&batched, 1, vec![Shape { name: "y".into(), sizes: vec![1] }], "one of x"),
            (&batched, 8, sized(&[3, 1 << 20]), "smaller"),
            (&batched, 8, sized(&[3, i64::MAX]), "can be counted"),
            (&model(Some(0), "FP32", &[2]), 2, vec![], "has no batch"),
            (&model(None, "FP32", &[2]), 2, vec![], "tells no max_batch_size"),
            (&model(Some(0), "FP8", &[2]), 1, vec![], "FP8"),
        ] {
            let refusal = make(model, batch, &given).unwrap_err();
            assert!(refusal.contains(why), "{why}: {refusal}");
        }
    }

    #[test]
    fn elements_are_of_their_type_and_the_same_every_time() {
        for (datatype, bytes) in [
            ("BOOL", 1),
            ("UINT8", 1),
            ("INT8", 1),
            ("UINT16", 2),
            ("INT16", 2),
            ("UINT32", 4),
            ("INT32", 4),
            ("UINT64", 8),
            ("INT64", 8),
            ("FP16", 2),
            ("BF16", 2),
            ("FP32", 4),
            ("FP64", 8),
            ("BYTES", 5),
        ] {
            let data = || make(&model(Some(0), datatype, &[100]), 1, &[]).unwrap()[0].data.clone();
            assert_eq!(data().len(), 100 * bytes, "{datatype}");
            assert_eq!(data(), data());
        }
        let floats = make(&model(Some(0), "FP32", &[1000]), 1, &[]).unwrap()[0].data.clone();
        let floats: Vec<f32> =
            floats.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        assert!(floats.iter().all(|float| (0.0..1.0).contains(float)));
        let mean = floats.iter().sum::<f32>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
        let texts = make(&model(Some(0), "BYTES", &[2]), 1, &[]).unwrap()[0].data.clone();
        let mut strings = vaccel_client::proto::tensor::strings(&texts);
        assert!(strings.all(|text| text.unwrap()[0].is_ascii_digit()));
    }
}
