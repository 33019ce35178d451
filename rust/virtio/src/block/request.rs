//! One request: 16 bytes of header, data, one byte of status at the end (VIRTIO 1.2, 5.2.6). How the parts are cut
//! into descriptors does not matter.

use super::disk::{Disk, Failed};
use super::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::queue::{Malformed, Reader, Writer};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// What GET_ID answers.
const IDENTITY: &[u8] = b"microvm";
const RANGE_BYTES: usize = 16;

enum Refused {
    /// Out of range, or the host failed.
    Failed,
    /// Not a request of this device.
    Unsupported,
}

impl From<Failed> for Refused {
    fn from(_: Failed) -> Refused {
        Refused::Failed
    }
}

/// Answers a request. Returns how many writable bytes it wrote, counted from the first.
///
/// # Errors
/// [`Malformed`] if there is no header or no place for the status: such a request cannot be answered.
pub(super) fn execute(
    disk: &Disk,
    features: u64,
    mut readable: Reader<'_>,
    mut writable: Writer<'_>,
) -> Result<u32, Malformed> {
    let mut header = [0u8; 16];
    readable.read_exact(&mut header).map_err(|_| Malformed::Request("block request without a whole header"))?;
    let Some(answer) = writable.remaining().checked_sub(1) else {
        return Err(Malformed::Request("block request without a status byte"));
    };
    let mut data = writable.take(answer)?;
    let [kind0, kind1, kind2, kind3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([kind0, kind1, kind2, kind3]);
    let sector = u64::from_le_bytes(sector);
    let status = match perform(disk, features, kind, sector, &mut readable, &mut data) {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(Refused::Failed) => VIRTIO_BLK_S_IOERR,
        Err(Refused::Unsupported) => VIRTIO_BLK_S_UNSUPP,
    };
    writable.write_all(&[u8::try_from(status).unwrap_or(u8::MAX)])?;
    // After an error the data buffer holds nothing that the driver may look at.
    let whole = data.remaining() == 0;
    let written = if whole { answer.saturating_add(1) } else { 0 };
    Ok(u32::try_from(written).unwrap_or(u32::MAX))
}

fn perform(
    disk: &Disk,
    features: u64,
    kind: u32,
    sector: u64,
    readable: &mut Reader<'_>,
    data: &mut Writer<'_>,
) -> Result<(), Refused> {
    let negotiated = |feature: u32| features & (1u64 << feature) != 0;
    match kind {
        VIRTIO_BLK_T_IN if data.remaining() > 0 => Ok(disk.read(sector, data)?),
        VIRTIO_BLK_T_OUT if readable.remaining() > 0 && !disk.is_read_only() => {
            disk.write(sector, readable)?;
            // Without FLUSH the driver counts on a write being permanent when it completes (5.2.6.2).
            if !negotiated(VIRTIO_BLK_F_FLUSH) {
                disk.flush()?;
            }
            Ok(())
        }
        VIRTIO_BLK_T_FLUSH => Ok(disk.flush()?),
        VIRTIO_BLK_T_GET_ID => identify(data),
        VIRTIO_BLK_T_DISCARD if negotiated(VIRTIO_BLK_F_DISCARD) => {
            for_each_range(readable, |sector, sectors, flags| match flags {
                0 => Ok(disk.discard(sector, sectors)?),
                _ => Err(Refused::Unsupported),
            })
        }
        VIRTIO_BLK_T_WRITE_ZEROES if negotiated(VIRTIO_BLK_F_WRITE_ZEROES) => {
            for_each_range(readable, |sector, sectors, flags| match flags {
                0 => Ok(disk.write_zeroes(sector, sectors, false)?),
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => Ok(disk.write_zeroes(sector, sectors, true)?),
                _ => Err(Refused::Unsupported),
            })
        }
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(Refused::Failed),
        _ => Err(Refused::Unsupported),
    }
}

/// 20 bytes, padded with NUL.
fn identify(data: &mut Writer<'_>) -> Result<(), Refused> {
    let length = usize::try_from(VIRTIO_BLK_ID_BYTES).map_err(|_| Refused::Failed)?;
    if data.remaining() != length {
        return Err(Refused::Failed);
    }
    let mut identity = IDENTITY.to_vec();
    identity.resize(length, 0);
    data.write_all(&identity).map_err(|_| Refused::Failed)
}

/// Hands each (sector, count, flags) of a discard or write-zeroes request to `apply`, after checking the request's
/// own limits. Ranges before a bad one are done, as on a real disk.
fn for_each_range(
    readable: &mut Reader<'_>,
    mut apply: impl FnMut(u64, u32, u32) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let length = readable.remaining();
    let limit = usize::try_from(MAX_RANGES).unwrap_or(usize::MAX).saturating_mul(RANGE_BYTES);
    if length == 0 || length > limit || length.checked_rem(RANGE_BYTES) != Some(0) {
        return Err(Refused::Failed);
    }
    while readable.remaining() > 0 {
        let mut sector = [0u8; 8];
        let mut sectors = [0u8; 4];
        let mut flags = [0u8; 4];
        for part in [sector.as_mut_slice(), &mut sectors, &mut flags] {
            readable.read_exact(part).map_err(|_| Refused::Failed)?;
        }
        let sectors = u32::from_le_bytes(sectors);
        if sectors > MAX_RANGE_SECTORS {
            return Err(Refused::Failed);
        }
        apply(u64::from_le_bytes(sector), sectors, u32::from_le_bytes(flags))?;
    }
    Ok(())
}
