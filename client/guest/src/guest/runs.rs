//! Calls with tensors: through the socket, or in memory that the agent has, too.

use super::Guest;
use crate::error::{Error, Reason, Result};
use crate::reply::{Computed, Generic};
use crate::request::{Ask, Beside, Room};
use crate::shared::{self, Lent, NotFound, Place};
use crate::transport::Transport;
use crate::types::{
    Arg, ArgOut, ArgType, ITEMS_MAX, Input, NAME_BYTES_MAX, Output, RANK_MAX, ResourceId, Sgemm, Timings,
};

/// The number of BLAS's product of matrices among vAccel's operations.
const SGEMM: u8 = 17;

impl<T: Transport> Guest<T> {
    /// Runs a model on `inputs`, at most [`ITEMS_MAX`]. `names` are the outputs wanted, none for all; each goes to the
    /// place in `outputs` of the same number.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for tensors that are not what the model takes and for a place that is too small, and those of
    /// [`Guest::classify`].
    pub fn run(
        &mut self,
        model: &ResourceId,
        inputs: &[Input<'_>],
        names: &[&str],
        outputs: &mut [Output<'_>],
    ) -> Result<Timings> {
        let until = self.until();
        let given = inputs.iter().map(|input| input.data);
        let lent = self.lend(until, given, outputs.iter().map(|output| output.data.len()));
        self.lending(lent, |guest, loan| guest.run_lent(until, model, inputs, names, outputs, loan))
    }

    /// Memory of so many bytes that the agent has, too: data that is produced there is not copied for
    /// [`Guest::run_from`].
    ///
    /// # Errors
    /// `UNUSABLE` where there is none: for such an agent the data is as good anywhere else.
    pub fn share(&mut self, bytes: usize) -> Result<T::Memory> {
        let until = self.until();
        let memory = self.link.transport.share(self.link.token.as_str(), bytes, until);
        let none = "the agent shares no memory, or not so much, or not over this kind of socket";
        memory.or_else(|_| self.fail(Reason::Unusable, none))
    }

    /// [`Guest::run`] on inputs of which some lie in `memory`. The data may be changed again when this returns, unless
    /// the call ended without an answer: then the agent may still be reading it, for its own.
    ///
    /// # Errors
    /// Those of [`Guest::run`]. That the agent was started anew, and does not know the memory, is none: the data is
    /// sent then.
    pub fn run_from(
        &mut self,
        memory: &T::Memory,
        model: &ResourceId,
        inputs: &[Input<'_>],
        names: &[&str],
        outputs: &mut [Output<'_>],
    ) -> Result<Timings> {
        let until = self.until();
        let lent = Lent::of(memory, inputs.iter().map(|input| input.data));
        match self.run_lent(until, model, inputs, names, outputs, Some((memory, &lent))) {
            Err(error) if error.region_lost => self.run_lent(until, model, inputs, names, outputs, None),
            outcome => outcome,
        }
    }

    /// Runs any operation by vAccel's number, with the arguments that vAccel's generic operation has: the first one
    /// read is a `UINT8`, the operation's number. Arguments read and written are at most [`ITEMS_MAX`] together.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for arguments that are not the operation's and for a place that is too small,
    /// `UNKNOWN_OPERATION`, and those of [`Guest::info`].
    pub fn genop(&mut self, read: &[Arg<'_>], write: &mut [ArgOut<'_>]) -> Result<Timings> {
        let until = self.until();
        let lent = self.lend(until, given(read, write), write.iter().map(|arg| arg.data.len()));
        self.lending(lent, |guest, loan| guest.genop_lent(until, read, write, loan))
    }

    /// [`Guest::genop`] on arguments of which some lie in `memory`, as for [`Guest::run_from`].
    ///
    /// # Errors
    /// Those of [`Guest::genop`].
    pub fn genop_from(
        &mut self,
        memory: &T::Memory,
        read: &[Arg<'_>],
        write: &mut [ArgOut<'_>],
    ) -> Result<Timings> {
        let until = self.until();
        let lent = Lent::of(memory, given(read, write));
        match self.genop_lent(until, read, write, Some((memory, &lent))) {
            Err(error) if error.region_lost => self.genop_lent(until, read, write, None),
            outcome => outcome,
        }
    }

    /// Multiplies matrices; `c` gets the result, with `ldc` elements from one row to the next as before.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for sizes that do not fit the data, and those of [`Guest::info`].
    pub fn sgemm(&mut self, product: &Sgemm<'_>, c: &mut [u8]) -> Result<Timings> {
        let Sgemm { sizes: [m, n, k], alpha, a, lda, b, ldb, beta, c: before, ldc } = *product;
        let number = i64::to_le_bytes;
        let numbers = [m, n, k, lda, ldb, ldc].map(number);
        let [m, n, k, lda, ldb, ldc] = &numbers;
        let (alpha, beta) = (alpha.to_le_bytes(), beta.to_le_bytes());
        let arg = |kind, data| Arg { kind, data };
        let read = [
            arg(ArgType::UINT8, &[SGEMM]),
            arg(ArgType::INT64, m),
            arg(ArgType::INT64, n),
            arg(ArgType::INT64, k),
            arg(ArgType::FLOAT32, &alpha),
            arg(ArgType::FLOAT32_ARRAY, a),
            arg(ArgType::INT64, lda),
            arg(ArgType::FLOAT32_ARRAY, b),
            arg(ArgType::INT64, ldb),
            arg(ArgType::FLOAT32, &beta),
            arg(ArgType::INT64, ldc),
        ];
        let write = ArgOut { kind: ArgType::FLOAT32_ARRAY, before, data: c, length: 0 };
        self.genop(&read, &mut [write])
    }
}

/// What a call is lent: memory, and what of it.
type Loan<'a, M> = Option<(&'a M, &'a Lent)>;

/// The data of a generic operation's arguments: of those read, then what those written are before.
fn given<'d>(read: &[Arg<'d>], write: &[ArgOut<'d>]) -> impl Iterator<Item = &'d [u8]> + Clone {
    read.iter().map(|arg| arg.data).chain(write.iter().map(|arg| arg.before))
}

impl<T: Transport> Guest<T> {
    /// Puts long data into the guest's own memory, and keeps room there for results of so many bytes.
    fn lend<'d>(
        &mut self,
        until: u64,
        given: impl Iterator<Item = &'d [u8]> + Clone,
        results: impl Iterator<Item = usize>,
    ) -> Option<(T::Memory, Lent)> {
        self.shared.lend(&mut self.link, until, given, results)
    }

    /// A call that is lent the guest's own memory, or none.
    fn lending(
        &mut self,
        lent: Option<(T::Memory, Lent)>,
        mut call: impl FnMut(&mut Self, Loan<'_, T::Memory>) -> Result<Timings>,
    ) -> Result<Timings> {
        let Some((memory, lent)) = lent else { return call(self, None) };
        let outcome = call(self, Some((&memory, &lent)));
        if outcome.is_err_and(|error| error.region_lost) {
            return call(self, None);
        }
        // An attempt that nobody waits for any more may still be about to write there.
        if !outcome.is_err_and(shared::is_open) && !self.link.is_repeated {
            self.shared.give_back(memory);
        }
        outcome
    }

    /// A run of whose tensors some may be lent.
    fn run_lent(
        &mut self,
        until: u64,
        model: &ResourceId,
        inputs: &[Input<'_>],
        names: &[&str],
        outputs: &mut [Output<'_>],
        loan: Loan<'_, T::Memory>,
    ) -> Result<Timings> {
        if inputs.len() > ITEMS_MAX || names.len() > ITEMS_MAX {
            return self.refuse("expected at most 16 inputs and 16 names of outputs");
        }
        if inputs.iter().any(|input| input.shape.len() > RANK_MAX || input.name.len() > NAME_BYTES_MAX) {
            return self.refuse("expected inputs of at most 8 axes with names of at most 256 bytes");
        }
        let lent = loan.map(|(_, lent)| lent);
        let mut rest = [Input::default(); ITEMS_MAX];
        for (index, (rest, input)) in rest.iter_mut().zip(inputs).enumerate() {
            *rest = Input { data: Lent::rest(lent, index, input.data), ..*input };
        }
        let inputs = rest.get(..inputs.len()).unwrap_or_default();
        let beside = Beside { lent, reply_type: self.reply_type };
        let mut computed = Computed::new(outputs);
        let outcome =
            self.ask_by(until, &Ask::ModelRun { model, inputs, outputs: names, beside }, &mut computed);
        let Computed { too_small, timings, places, .. } = computed;
        let results = outputs.iter_mut().map(|output| (&mut *output.data, &mut output.length));
        self.found("outputs", outcome, too_small, loan, places.as_slice(), results)?;
        Ok(timings)
    }

    /// A generic operation of whose arguments some may be lent.
    fn genop_lent(
        &mut self,
        until: u64,
        read: &[Arg<'_>],
        write: &mut [ArgOut<'_>],
        loan: Loan<'_, T::Memory>,
    ) -> Result<Timings> {
        if read.len() + write.len() > ITEMS_MAX {
            return self.refuse("expected at most 16 arguments");
        }
        let lent = loan.map(|(_, lent)| lent);
        let mut rest = [Arg { kind: ArgType::RAW, data: &[] }; ITEMS_MAX];
        let mut rooms = [Room { kind: ArgType::RAW, before: &[], size: 0 }; ITEMS_MAX];
        for (index, (rest, arg)) in rest.iter_mut().zip(read).enumerate() {
            *rest = Arg { data: Lent::rest(lent, index, arg.data), ..*arg };
        }
        for (index, (room, arg)) in rooms.iter_mut().zip(write.iter()).enumerate() {
            let before = Lent::rest(lent, read.len() + index, arg.before);
            // What there is before says how much room there is.
            let size = if arg.before.is_empty() { arg.data.len() } else { 0 };
            *room = Room { kind: arg.kind, before, size };
        }
        let read = rest.get(..read.len()).unwrap_or_default();
        let rooms = rooms.get(..write.len()).unwrap_or_default();
        let beside = Beside { lent, ..Beside::default() };
        let mut generic = Generic::new(write);
        let outcome = self.ask_by(until, &Ask::Genop { read, write: rooms, beside }, &mut generic);
        let Generic { too_small, timings, places, .. } = generic;
        let results = write.iter_mut().map(|arg| (&mut *arg.data, &mut arg.length));
        self.found("write", outcome, too_small, loan, places.as_slice(), results)?;
        Ok(timings)
    }

    /// The outcome of a call whose results go to places of the caller's.
    fn found<'r>(
        &mut self,
        what: &str,
        outcome: Result<()>,
        mut too_small: Option<(usize, usize)>,
        loan: Loan<'_, T::Memory>,
        places: &[Place],
        results: impl Iterator<Item = (&'r mut [u8], &'r mut usize)>,
    ) -> Result<()> {
        if outcome.is_ok() {
            match shared::fetch(loan.map_or(&[], |(memory, _)| memory), places, results) {
                Ok(()) => return Ok(()),
                Err(NotFound::Outside) => {
                    let wrong = "the agent's reply names places that are not its own";
                    let failed = self.fail(Reason::BackendFailed, wrong);
                    return failed.map_err(|error| Error { may_have_run: true, ..error });
                }
                Err(NotFound::TooSmall(index, bytes)) => too_small = Some((index, bytes)),
            }
        }
        let Some((index, bytes)) = too_small else { return outcome };
        self.link.text.clear();
        let text = self.link.text.push(what).push("[").push_number(index as u64);
        text.push("]: expected a place for ").push_number(bytes as u64).push(" bytes");
        Err(Error { may_have_run: true, ..Error::new(Reason::BadArgument) })
    }
}
