//! How calls name the inputs and outputs of a model.

use vaccel_proto::Error;
use vaccel_proto::error::shown;
use vaccel_proto::v1::{DType, NamedTensor, Tensor, TfInput, TfNode};

use super::widths::widens;
use crate::backend::Port;

/// What a call gives for one input.
struct Given {
    /// Which input it is for, or what the call should have said.
    place: Result<usize, Error>,
    /// How the call named it.
    shown: String,
    tensor: Option<Tensor>,
}

/// The tensors in the order of the model's inputs, each checked against its own.
fn arrange(ports: &[Port], inputs: Vec<Given>) -> Result<Vec<Tensor>, Error> {
    if inputs.len() != ports.len() {
        let expected = format!("{} tensors ({})", ports.len(), list(ports));
        return Err(Error::field("inputs", expected, inputs.len()));
    }
    let mut arranged: Vec<Option<Tensor>> = vec![None; ports.len()];
    for (index, Given { place, shown, tensor }) in inputs.into_iter().enumerate() {
        let path = format!("inputs[{index}]");
        let place = place?;
        let Some(tensor) = tensor else { return Err(Error::field(path, "a tensor", "none")) };
        check_port(&path, &ports[place], &tensor)?;
        if arranged[place].replace(tensor).is_some() {
            return Err(Error::field(format!("{path}.name"), "each input once", shown));
        }
    }
    // As many tensors as ports and none twice: every place is filled.
    Ok(arranged.into_iter().flatten().collect())
}

/// Inputs all by name, or all by position.
pub(super) fn arrange_named(ports: &[Port], inputs: Vec<NamedTensor>) -> Result<Vec<Tensor>, Error> {
    let by_position = inputs.iter().all(|input| input.name.is_empty());
    let given = inputs.into_iter().enumerate().map(|(index, NamedTensor { name, tensor })| {
        let place = if by_position { Some(index) } else { ports.iter().position(|port| port.name == name) };
        let place = place.ok_or_else(|| {
            Error::field(format!("inputs[{index}].name"), format!("one of {}", list(ports)), shown(&name))
        });
        Given { place, shown: shown(&name), tensor }
    });
    arrange(ports, given.collect())
}

/// Inputs by node.
pub(super) fn arrange_nodes(ports: &[Port], inputs: Vec<TfInput>) -> Result<Vec<Tensor>, Error> {
    let given = inputs.into_iter().enumerate().map(|(index, TfInput { name, id, tensor })| {
        let place = find_node(ports, &name, id);
        let place = place.ok_or_else(|| unknown_node(&format!("inputs[{index}]"), ports, &name, id));
        Given { place, shown: node(&name, id), tensor }
    });
    arrange(ports, given.collect())
}

fn check_port(path: &str, port: &Port, tensor: &Tensor) -> Result<(), Error> {
    if tensor.dtype() != port.dtype && !widens(tensor.dtype(), port.dtype) {
        return Err(Error::field(format!("{path}.dtype"), describe(port), tensor.signature()));
    }
    let Some(shape) = &port.shape else { return Ok(()) };
    let fits = shape.len() == tensor.shape.len()
        && shape
            .iter()
            .zip(&tensor.shape)
            .all(|(declared, given)| declared.is_none_or(|declared| declared == *given));
    if fits { Ok(()) } else { Err(Error::field(format!("{path}.shape"), describe(port), tensor.signature())) }
}

/// An input or output as people write it, as in `"image" f32[?, 1, 8, 8]`.
fn describe(port: &Port) -> String {
    let dimension = |dim: &Option<i64>| dim.map_or("?".to_owned(), |dim| dim.to_string());
    let shape = port
        .shape
        .as_ref()
        .map_or("…".to_owned(), |shape| shape.iter().map(dimension).collect::<Vec<_>>().join(", "));
    let dtype = if port.dtype == DType::Unspecified { "?" } else { port.dtype.name() };
    format!("{} {dtype}[{shape}]", shown(&port.name))
}

fn list(ports: &[Port]) -> String {
    ports.iter().map(describe).collect::<Vec<_>>().join(", ")
}

/// The outputs wanted, each once; all where none is named.
fn choose<T>(
    ports: &[Port],
    wanted: &[T],
    find: impl Fn(usize, &T) -> Result<usize, Error>,
) -> Result<Vec<usize>, Error> {
    if wanted.is_empty() {
        return Ok((0..ports.len()).collect());
    }
    let mut chosen = Vec::with_capacity(wanted.len());
    for (at, one) in wanted.iter().enumerate() {
        let index = find(at, one)?;
        // Each occurrence would be a copy.
        if chosen.contains(&index) {
            return Err(Error::field("outputs", "each output once", shown(&ports[index].name)));
        }
        chosen.push(index);
    }
    Ok(chosen)
}

/// Outputs by name, or by place as `#0`, `#1` and so on. A name goes first.
pub(super) fn choose_named(ports: &[Port], wanted: &[String]) -> Result<Vec<usize>, Error> {
    choose(ports, wanted, |_, name: &String| {
        let named = ports.iter().position(|port| port.name == *name);
        let digits = || name.strip_prefix('#').filter(|digits| digits.bytes().all(|c| c.is_ascii_digit()));
        let placed = || digits()?.parse().ok().filter(|place| *place < ports.len());
        named.or_else(placed).ok_or_else(|| {
            Error::field("outputs", format!("names of {}, or #0 and so on", list(ports)), shown(name))
        })
    })
}

/// Outputs by node.
pub(super) fn choose_nodes(ports: &[Port], wanted: &[TfNode]) -> Result<Vec<usize>, Error> {
    choose(ports, wanted, |at, TfNode { name, id }| {
        find_node(ports, name, *id).ok_or_else(|| unknown_node(&format!("outputs[{at}]"), ports, name, *id))
    })
}

/// The place of a node's output among the ports: `name` with output `id`, or `name:id`; without a name, `id` is the
/// place itself.
fn find_node(ports: &[Port], name: &str, id: u32) -> Option<usize> {
    let named = |name: &str| ports.iter().position(|port| port.name == name);
    if name.is_empty() {
        return usize::try_from(id).ok().filter(|place| *place < ports.len());
    }
    // A port may have a colon in its own name.
    if let Some(place) = named(name).filter(|_| id == 0 || name.ends_with(&format!(":{id}"))) {
        return Some(place);
    }
    match name.rsplit_once(':').map(|(node, output)| (node, output.parse::<u32>())) {
        Some((node, Ok(0))) if id == 0 => named(node),
        Some((_, Ok(_))) => None,
        _ if id == 0 => None,
        _ => named(&format!("{name}:{id}")),
    }
}

/// A node as TensorFlow writes it.
fn node(name: &str, id: u32) -> String {
    shown(&format!("{name}:{id}"))
}

fn unknown_node(path: &str, ports: &[Port], name: &str, id: u32) -> Error {
    Error::field(format!("{path}.name"), format!("a node of {}", list(ports)), node(name, id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_proto::error::Detail;
    use vaccel_proto::v1::DType;

    fn ports() -> Vec<Port> {
        let port = |name: &str, dtype, shape| Port { name: name.into(), dtype, shape };
        vec![port("a", DType::F32, Some(vec![None, Some(2)])), port("b", DType::I64, None)]
    }

    fn named(name: &str, tensor: Tensor) -> NamedTensor {
        NamedTensor { name: name.into(), tensor: Some(tensor) }
    }

    fn pair(first: &str, second: &str) -> Vec<NamedTensor> {
        let a = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).expect("valid");
        let b = Tensor::new(&[1], &[7_i64]).expect("valid");
        vec![named(first, a), named(second, b)]
    }

    #[test]
    fn inputs_come_by_name_in_any_order_or_by_position() {
        let mut swapped = pair("a", "b");
        swapped.reverse();
        for inputs in [pair("", ""), pair("a", "b"), swapped] {
            let arranged = arrange_named(&ports(), inputs).expect("fits");
            assert_eq!([arranged[0].dtype(), arranged[1].dtype()], [DType::F32, DType::I64]);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let wide = named("a", Tensor::new(&[1, 3], &[0.0_f32; 3]).expect("valid"));
        let flat = named("a", Tensor::new(&[2], &[0.0_f32; 2]).expect("valid"));
        let typed = named("a", Tensor::new(&[1, 2], &[0_i32; 2]).expect("valid"));
        let other = || pair("a", "b").remove(1);
        for (inputs, field) in [
            (vec![], "inputs"),
            (pair("a", "c"), "inputs[1].name"),
            (pair("a", ""), "inputs[1].name"),
            (vec![wide, other()], "inputs[0].shape"),
            (vec![flat, other()], "inputs[0].shape"),
            (vec![typed, other()], "inputs[0].dtype"),
        ] {
            let refusal = arrange_named(&ports(), inputs).expect_err(field);
            assert_eq!(refusal.detail(), &Detail::Field(field.into()), "{refusal}");
        }
        let twice = vec![pair("a", "b").remove(0), pair("a", "b").remove(0)];
        assert!(arrange_named(&ports(), twice).is_err());
    }

    #[test]
    fn outputs_are_chosen_by_name() {
        assert_eq!(choose_named(&ports(), &[]).expect("all"), [0, 1]);
        assert_eq!(choose_named(&ports(), &["b".into()]).expect("one"), [1]);
        assert!(choose_named(&ports(), &["c".into()]).is_err());
        assert!(choose_named(&ports(), &["b".into(), "b".into()]).is_err());
    }

    #[test]
    fn outputs_are_chosen_by_place_unless_one_has_that_name() {
        assert_eq!(choose_named(&ports(), &["#1".into(), "a".into()]).expect("two"), [1, 0]);
        for wrong in ["#2", "#", "#-1", "#+1", "1"] {
            assert!(choose_named(&ports(), &[wrong.into()]).is_err(), "{wrong}");
        }
        assert!(choose_named(&ports(), &["#0".into(), "a".into()]).is_err(), "the same output");
        let mut named = ports();
        named[0].name = "#1".into();
        assert_eq!(choose_named(&named, &["#1".into()]).expect("by name"), [0]);
    }

    #[test]
    fn nodes_are_found_by_name_number_and_place() {
        let mut ports = ports();
        ports.push(Port { name: "split:2".into(), ..ports[0].clone() });
        for (name, id, place) in [
            ("a", 0, Some(0)),
            ("a:0", 0, Some(0)),
            ("b", 0, Some(1)),
            ("", 1, Some(1)),
            ("split", 2, Some(2)),
            ("split:2", 0, Some(2)),
            ("split:2", 2, Some(2)),
            ("a", 1, None),
            ("a:1", 0, None),
            ("a:0", 1, None),
            ("split", 0, None),
            ("split:2", 1, None),
            ("a:x", 0, None),
            ("", 3, None),
            ("c", 0, None),
        ] {
            assert_eq!(find_node(&ports, name, id), place, "{name:?} {id}");
        }
    }
}
