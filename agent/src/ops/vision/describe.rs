//! A model's own description: JSON of one object, whose keys are those of an image's way into the model and those of an
//! operation's way out of it.

use serde::de::value::Error as Unread;
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use vaccel_proto::error::shown;
use vaccel_proto::limits::NAME_BYTES_MAX;
use vaccel_proto::{Error, Reason};

use super::ImageInput;
use crate::backend::ModelFile;

/// Names of one kind in a description: classes, or points of a body. The largest sets in use have some 20,000.
const NAMES_MAX: usize = 1 << 16;

/// Bytes of a description: the names of 20,000 classes, each as long as a line, fit four times.
const BYTES_MAX: usize = 4 << 20;

/// A description that is read in parts, each with keys of its own.
pub(in crate::ops) struct Description<'a> {
    text: &'a str,
    known: Vec<&'static str>,
}

impl<'a> Description<'a> {
    pub(in crate::ops) fn of(text: &'a str) -> Self {
        Self { text, known: Vec::new() }
    }

    /// One of its parts.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(in crate::ops) fn part<T: DeserializeOwned>(&mut self) -> Result<T, String> {
        self.known.extend(keys::<T>());
        serde_json::from_str(self.text).map_err(|error| error.to_string())
    }

    /// # Errors
    /// A key that belongs to none of its parts.
    fn end(&self) -> Result<(), String> {
        let all: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(self.text).map_err(|error| error.to_string())?;
        match all.keys().find(|key| !self.known.contains(&key.as_str())) {
            Some(key) => Err(format!("no key {}, expected some of {}", shown(key), self.known.join(", "))),
            None => Ok(()),
        }
    }
}

/// Reads a model's description for an operation, and checks it against the model's input.
///
/// # Errors
/// `MODEL_REJECTED` for a model without one, and for one that is wrong or not of this model.
pub(in crate::ops) fn read<T>(
    model: &ModelFile,
    operation: &str,
    part: impl FnOnce(&mut Description<'_>) -> Result<T, String>,
) -> Result<(ImageInput, T), Error> {
    let refuse = |why: String| Error::new(Reason::ModelRejected, why);
    let (file, property) = (format!("{operation}.json"), format!("vaccel.{operation}"));
    let text = model.description(&file, &property).ok_or_else(|| {
        refuse(format!(
            "this model does not say how images become its input; \
             add the metadata property {property} or a file {file} to its resource"
        ))
    })?;
    let wrong = |why: String| refuse(format!("the image description of this model is wrong: {why}"));
    let read = || -> Result<_, String> {
        if text.len() > BYTES_MAX {
            return Err(format!("expected at most {BYTES_MAX} bytes, got {}", text.len()));
        }
        let mut description = Description::of(&text);
        let input: ImageInput = description.part()?;
        input.check()?;
        let part = part(&mut description)?;
        description.end()?;
        Ok((input, part))
    };
    let (input, part) = read().map_err(wrong)?;
    input.fits(model)?;
    Ok((input, part))
}

/// Checks names: their number, and the length of each, as replies repeat them.
pub(in crate::ops) fn check_names(key: &str, names: &[String]) -> Result<(), String> {
    if names.is_empty() || names.len() > NAMES_MAX {
        return Err(format!("{key}: expected 1 to {NAMES_MAX} names, got {}", names.len()));
    }
    match names.iter().find(|name| name.len() > NAME_BYTES_MAX) {
        Some(long) => {
            Err(format!("{key}: expected names of at most {NAME_BYTES_MAX} bytes, got {}", long.len()))
        }
        None => Ok(()),
    }
}

/// The keys of a part, as its type declares them.
fn keys<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut keys: &'static [&'static str] = &[];
    // It ends with an error by itself: there is nothing to read.
    let _ = T::deserialize(Keys(&mut keys));
    keys
}

/// Takes down the fields that a structure asks for.
struct Keys<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Keys<'_> {
    type Error = Unread;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Unread> {
        Err(serde::de::Error::custom("nothing is read"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unread> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Part {
        one: u32,
        #[serde(default)]
        two: Vec<u32>,
    }

    #[test]
    fn parts_know_their_keys_and_nothing_else_is_taken() {
        let mut both = Description::of(r#"{"one": 1, "width": 2, "height": 3}"#);
        assert_eq!(both.part::<Part>(), Ok(Part { one: 1, two: vec![] }));
        let missing = both.end().expect_err("width");
        assert!(missing.contains("expected some of one, two"), "{missing}");
        both.part::<ImageInput>().expect("a size is enough");
        assert_eq!(both.end(), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let wrong = Description::of("{\n\"one\": \"1\"}").part::<Part>().expect_err("a string");
        assert!(wrong.contains("line 2"), "{wrong}");
        for text in ["", "[]", "{", "7"] {
            assert!(Description::of(text).part::<Part>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_bounded() {
        assert_eq!(check_names("labels", &["a".into()]), Ok(()));
        assert!(check_names("labels", &[]).is_err());
        assert!(check_names("labels", &["a".repeat(NAME_BYTES_MAX + 1)]).is_err());
    }
}
