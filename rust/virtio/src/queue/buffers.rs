//! Bytes of a chain: guest memory, read or written in place.
//!
//! The guest may change these bytes at any time, so they are never borrowed as Rust slices: they are copied out,
//! or handed to the kernel as I/O vectors.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use vm_memory::{ByteValued, VolatileSlice};

/// Most I/O vectors for one system call (the kernel takes 1024).
const VECTORS: usize = 128;

/// A structure does not fit into what is left of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} bytes needed, {available} left in the buffer")]
pub struct ShortBuffer {
    /// Bytes asked for.
    pub needed: usize,
    /// Bytes there are.
    pub available: usize,
}

#[derive(Debug, Default)]
struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    /// Slices before this one are used up.
    first: usize,
    remaining: usize,
}

impl<'m> Buffers<'m> {
    fn new(slices: Vec<VolatileSlice<'m>>) -> Buffers<'m> {
        let remaining = slices.iter().fold(0usize, |sum, slice| sum.saturating_add(slice.len()));
        Buffers { slices, first: 0, remaining }
    }

    fn need(&self, needed: usize) -> Result<(), ShortBuffer> {
        let available = self.remaining;
        if needed > available {
            return Err(ShortBuffer { needed, available });
        }
        Ok(())
    }

    /// Moves on by `count` bytes, at most what is left, telling `visit` about each piece.
    fn advance(&mut self, count: usize, mut visit: impl FnMut(VolatileSlice<'m>)) {
        let mut left = count.min(self.remaining);
        self.remaining = self.remaining.saturating_sub(left);
        while left > 0 {
            let Some(slice) = self.slices.get_mut(self.first) else {
                return;
            };
            match slice.split_at(left) {
                Ok((taken, rest)) if !rest.is_empty() => {
                    visit(taken);
                    *slice = rest;
                    return;
                }
                _ => {
                    left = left.saturating_sub(slice.len());
                    visit(*slice);
                    self.first = self.first.saturating_add(1);
                }
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<Buffers<'m>, ShortBuffer> {
        self.need(count)?;
        let mut slices = Vec::new();
        self.advance(count, |slice| slices.push(slice));
        Ok(Buffers::new(slices))
    }

    /// One call of `io` over at most `limit` bytes; moves on by what it did.
    fn transfer(&mut self, limit: usize, io: impl FnOnce(&[libc::iovec]) -> isize) -> io::Result<usize> {
        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; VECTORS];
        let mut left = limit.min(self.remaining);
        let mut used = 0usize;
        for (vector, slice) in vectors.iter_mut().zip(self.slices.iter().skip(self.first)) {
            if left == 0 {
                break;
            }
            vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            vector.iov_len = slice.len().min(left);
            left = left.saturating_sub(vector.iov_len);
            used = used.saturating_add(1);
        }
        let result = io(vectors.get(..used).unwrap_or_default());
        let count = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        self.advance(count, |_| {});
        Ok(count)
    }

    /// Calls `io` until `count` bytes are done; it gets the offset so far.
    fn transfer_all(&mut self, count: usize, mut io: impl FnMut(&[libc::iovec], usize) -> isize) -> io::Result<()> {
        self.need(count).map_err(io::Error::other)?;
        let mut done = 0usize;
        while done < count {
            match self.transfer(count.saturating_sub(done), |vectors| io(vectors, done)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => done = done.saturating_add(moved),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn vector_count(vectors: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(vectors.len()).unwrap_or(0)
}

fn file_offset(offset: u64, done: usize) -> io::Result<libc::off_t> {
    u64::try_from(done)
        .ok()
        .and_then(|done| offset.checked_add(done))
        .and_then(|offset| libc::off_t::try_from(offset).ok())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// The device-readable bytes of a chain, in order.
#[derive(Debug, Default)]
pub struct Reader<'m>(Buffers<'m>);

impl<'m> Reader<'m> {
    pub(super) fn new(slices: Vec<VolatileSlice<'m>>) -> Reader<'m> {
        Reader(Buffers::new(slices))
    }

    /// Bytes left.
    pub fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// Splits the next `count` bytes off.
    ///
    /// # Errors
    /// [`ShortBuffer`] if there are fewer.
    pub fn take(&mut self, count: usize) -> Result<Reader<'m>, ShortBuffer> {
        self.0.take(count).map(Reader)
    }

    /// Copies bytes out, all of `into`.
    ///
    /// # Errors
    /// [`ShortBuffer`] if there are fewer; then nothing moves.
    pub fn read_exact(&mut self, into: &mut [u8]) -> Result<(), ShortBuffer> {
        self.0.need(into.len())?;
        let mut rest = into;
        self.0.advance(rest.len(), |slice| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut_checked(slice.len()).unwrap_or_default();
            slice.copy_to(part);
            rest = tail;
        });
        Ok(())
    }

    /// Copies a structure out.
    ///
    /// # Errors
    /// [`ShortBuffer`] if it is not there as a whole.
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Result<T, ShortBuffer> {
        let mut object = T::default();
        self.read_exact(object.as_mut_slice())?;
        Ok(object)
    }

    /// Writes the next `count` bytes to `file` at `offset`, all of them.
    ///
    /// # Errors
    /// Those of pwritev(2).
    pub fn write_to_file(&mut self, file: &impl AsFd, offset: u64, count: usize) -> io::Result<()> {
        let descriptor = file.as_fd().as_raw_fd();
        file_offset(offset, count)?;
        self.0.transfer_all(count, |vectors, done| {
            let Ok(offset) = file_offset(offset, done) else {
                return 0;
            };
            // SAFETY: the vectors point into guest memory that outlives the call, and the kernel only reads them.
            unsafe { libc::pwritev(descriptor, vectors.as_ptr(), vector_count(vectors), offset) }
        })
    }

    /// Sends what is left on a non-blocking stream socket, as much as it takes now.
    ///
    /// # Errors
    /// Those of sendmsg(2), `WouldBlock` among them. There is no SIGPIPE.
    pub fn send(&mut self, socket: &impl AsFd) -> io::Result<usize> {
        let descriptor = socket.as_fd().as_raw_fd();
        let remaining = self.0.remaining;
        self.0.transfer(remaining, |vectors| {
            // SAFETY: all zeroes is a valid msghdr: no name, no vectors, no control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = vectors.as_ptr().cast_mut();
            message.msg_iovlen = vectors.len();
            // SAFETY: as above; sendmsg does not write through msg_iov.
            unsafe { libc::sendmsg(descriptor, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
        })
    }
}

/// The device-writable bytes of a chain, in order.
#[derive(Debug, Default)]
pub struct Writer<'m>(Buffers<'m>);

impl<'m> Writer<'m> {
    pub(super) fn new(slices: Vec<VolatileSlice<'m>>) -> Writer<'m> {
        Writer(Buffers::new(slices))
    }

    /// Bytes left.
    pub fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// Splits the next `count` bytes off.
    ///
    /// # Errors
    /// [`ShortBuffer`] if there are fewer.
    pub fn take(&mut self, count: usize) -> Result<Writer<'m>, ShortBuffer> {
        self.0.take(count).map(Writer)
    }

    /// Copies all of `bytes` in.
    ///
    /// # Errors
    /// [`ShortBuffer`] if they do not fit; then nothing moves.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), ShortBuffer> {
        self.0.need(bytes.len())?;
        let mut rest = bytes;
        self.0.advance(bytes.len(), |slice| {
            let (part, tail) = rest.split_at_checked(slice.len()).unwrap_or_default();
            slice.copy_from(part);
            rest = tail;
        });
        Ok(())
    }

    /// Copies a structure in.
    ///
    /// # Errors
    /// [`ShortBuffer`] if it does not fit.
    pub fn write_object<T: ByteValued>(&mut self, object: &T) -> Result<(), ShortBuffer> {
        self.write_all(object.as_slice())
    }

    /// Fills the next `count` bytes from `file` at `offset`, all of them.
    ///
    /// # Errors
    /// Those of preadv(2); `UnexpectedEof` if the file ends before.
    pub fn read_from_file(&mut self, file: &impl AsFd, offset: u64, count: usize) -> io::Result<()> {
        let descriptor = file.as_fd().as_raw_fd();
        file_offset(offset, count)?;
        self.0.transfer_all(count, |vectors, done| {
            let Ok(offset) = file_offset(offset, done) else {
                return 0;
            };
            // SAFETY: the vectors point into guest memory that outlives the call and that the kernel may write:
            // nothing in this process relies on its contents.
            unsafe { libc::preadv(descriptor, vectors.as_ptr(), vector_count(vectors), offset) }
        })
    }

    /// Receives from a non-blocking stream socket what is there, at most `limit` bytes. 0 is its end.
    ///
    /// # Errors
    /// Those of readv(2), `WouldBlock` among them.
    pub fn receive(&mut self, socket: &impl AsFd, limit: usize) -> io::Result<usize> {
        let descriptor = socket.as_fd().as_raw_fd();
        self.0.transfer(limit, |vectors| {
            // SAFETY: as in `read_from_file`.
            unsafe { libc::readv(descriptor, vectors.as_ptr(), vector_count(vectors)) }
        })
    }
}
