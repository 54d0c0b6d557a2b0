//! The thin guest.

use std::collections::HashMap;

use vaccel_guest::{
    Arg, ArgOut, ArgType, DType, File, Guest, Input, Output, Posix, ResourceId, ResourceKind, SharedMemory,
};

use super::model;
use crate::Failure;
use crate::shape::Shape;

/// The number of `exec` among vAccel's operations: on the engine that computes nothing it gives back what its written
/// arguments were before, whatever it reads.
pub(super) const EXEC: u8 = 1;

/// Name of the library and of its function. Nobody looks for them.
pub(super) const NOTHING: &[u8] = b"nothing\0";

/// What answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// Computes nothing: model runs give their inputs back, other operations what their results were before.
    Noop,
    /// Runs a model that gives the begin of its input.
    Tract,
}

/// How data comes to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Socket,
    /// Through shared memory, into which it is copied.
    Copy,
    /// It is there already.
    InPlace,
}

/// A guest, and what it sends and receives.
pub(super) struct Caller {
    // It has all its memory in it.
    guest: Box<Guest<Posix>>,
    engine: Engine,
    way: Way,
    memory: Option<SharedMemory>,
    models: HashMap<Shape, ResourceId>,
    up: Vec<u8>,
    down: Vec<u8>,
}

impl Caller {
    pub(super) fn new(address: &str, engine: Engine, way: Way) -> Result<Self, Failure> {
        let mut guest = Box::new(Guest::new(address.parse::<Posix>().map_err(|_| "no address")?));
        // A connection that ended while others had their turn is no failure.
        guest.set_repeatable(true);
        if way == Way::Socket {
            guest.set_shared_bytes(0);
        }
        let (models, memory, up, down) = (HashMap::new(), None, Vec::new(), Vec::new());
        Ok(Self { guest, engine, way, memory, models, up, down })
    }

    /// Runs the model of this shape, with all bytes as its input.
    fn run(&mut self, shape: Shape) -> Result<usize, vaccel_guest::Error> {
        let Self { guest, models, up, down, .. } = self;
        let model = match models.get(&shape) {
            Some(model) => *model,
            None => {
                let files = [File { name: "model.onnx", content: &model::cut(shape) }];
                let model = guest.register(ResourceKind::Model, &files)?;
                *models.entry(shape).or_insert(model)
            }
        };
        let elements = [model::elements(shape.up)];
        let input = Input { name: "x", dtype: DType::F32, shape: &elements, data: &up[..shape.up] };
        let mut outputs = [Output::new(&mut down[..shape.down()])];
        guest.run(&model, &[input], &[], &mut outputs)?;
        Ok(outputs[0].length)
    }

    /// Gives a library some bytes to read, and all others as what is written before it is.
    fn exec(&mut self, shape: Shape) -> Result<usize, vaccel_guest::Error> {
        let up = self.memory.as_deref().unwrap_or(&self.up);
        let (before, data) = up[..shape.up].split_at(shape.down());
        let read = [
            Arg { kind: ArgType::UINT8, data: &[EXEC] },
            Arg { kind: ArgType::STRING, data: NOTHING },
            Arg { kind: ArgType::STRING, data: NOTHING },
            Arg { kind: ArgType::BUFFER, data },
        ];
        let place = &mut self.down[..shape.down()];
        let mut write = [ArgOut { kind: ArgType::BUFFER, before, data: place, length: 0 }];
        match &self.memory {
            Some(memory) => self.guest.genop_from(memory, &read, &mut write)?,
            None => self.guest.genop(&read, &mut write)?,
        };
        Ok(write[0].length)
    }
}

impl super::Caller for Caller {
    fn call(&mut self, shape: Shape) -> Result<(), Failure> {
        if self.up.len() < shape.up {
            self.up.resize(shape.up, 1);
        }
        if self.way == Way::InPlace && self.memory.as_ref().is_none_or(|memory| memory.len() < shape.up) {
            let memory = self.guest.share(shape.up);
            let mut memory = memory.map_err(|error| format!("{error:?}: {}", self.guest.message()))?;
            memory.fill(1);
            self.memory = Some(memory);
        }
        if self.down.len() < shape.down() {
            self.down.resize(shape.down(), 1);
        }
        let came = if shape.up == 0 {
            self.guest.noop().map(|_| 0)
        } else if shape.echo || self.engine == Engine::Tract {
            self.run(shape)
        } else {
            self.exec(shape)
        };
        let came = came.map_err(|error| format!("{error:?}: {}", self.guest.message()))?;
        super::check(came, shape)
    }
}
