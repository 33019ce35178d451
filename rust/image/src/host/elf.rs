//! What a program says about what it needs to run. Reads the few places of the file that say so.

use crate::ImageError;
use goblin::elf::dynamic::{DT_NEEDED, DT_NULL, DT_RPATH, DT_RUNPATH, DT_STRTAB};
use goblin::elf::header::{EM_X86_64, ET_DYN, ET_EXEC, header64};
use goblin::elf::program_header::{PT_DYNAMIC, PT_INTERP, PT_LOAD, program_header64};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Limits for what is read of one file; what is larger is not taken for a program.
const MAX_PROGRAM_HEADERS: u16 = 256;
const MAX_DYNAMIC: u64 = 1 << 16;
const MAX_STRING: usize = 4096;
/// Longest first line of a script the kernel looks at.
const MAX_SCRIPT_LINE: usize = 256;

/// A dynamically linked program or library for x86-64.
#[derive(Debug, Default)]
pub struct Dynamic {
    /// The dynamic loader.
    pub interpreter: Option<PathBuf>,
    /// Libraries, by name.
    pub needed: Vec<String>,
    /// `DT_RPATH`: colon-separated, `$ORIGIN` not replaced.
    pub rpath: Option<String>,
    /// `DT_RUNPATH`, likewise.
    pub runpath: Option<String>,
}

/// What the file at `path` needs; `None` if it is no ELF file for x86-64 that can be loaded.
pub fn read(path: &Path) -> Result<Option<Dynamic>, ImageError> {
    let file = File::open(path).map_err(ImageError::io("read", path))?;
    parse(&file).map_err(ImageError::io("read", path))
}

fn parse(file: &File) -> io::Result<Option<Dynamic>> {
    let mut bytes = [0; header64::SIZEOF_EHDR];
    if !read_at(file, &mut bytes, 0)? || !bytes.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let header = header64::Header::from_bytes(&bytes);
    let loadable = matches!(header.e_type, ET_EXEC | ET_DYN) && header.e_machine == EM_X86_64;
    let entry_size = usize::from(header.e_phentsize);
    if !loadable || entry_size != program_header64::SIZEOF_PHDR || header.e_phnum > MAX_PROGRAM_HEADERS {
        return Ok(None);
    }
    let mut table = vec![0; usize::from(header.e_phnum).saturating_mul(entry_size)];
    if !read_at(file, &mut table, header.e_phoff)? {
        return Ok(None);
    }
    let segments = program_header64::ProgramHeader::from_bytes(&table, usize::from(header.e_phnum));
    let mut dynamic = Dynamic::default();
    for segment in &segments {
        match segment.p_type {
            PT_INTERP => {
                let text = string_at(file, segment.p_offset)?;
                dynamic.interpreter = text.map(|text| PathBuf::from(OsStr::from_bytes(&text)));
            }
            PT_DYNAMIC if !parse_dynamic(file, segment, &segments, &mut dynamic)? => return Ok(None),
            _ => {}
        }
    }
    Ok(Some(dynamic))
}

fn parse_dynamic(
    file: &File,
    segment: &program_header64::ProgramHeader,
    segments: &[program_header64::ProgramHeader],
    dynamic: &mut Dynamic,
) -> io::Result<bool> {
    // An entry is a tag and a value of 8 bytes each.
    let mut table = vec![0; usize::try_from(segment.p_filesz.min(MAX_DYNAMIC)).unwrap_or(0)];
    if !read_at(file, &mut table, segment.p_offset)? {
        return Ok(false);
    }
    let entries = table.chunks_exact(16).filter_map(|entry| {
        let (tag, value) = entry.split_first_chunk::<8>()?;
        Some((u64::from_le_bytes(*tag), u64::from_le_bytes(*value.first_chunk::<8>()?)))
    });
    let entries: Vec<(u64, u64)> = entries.take_while(|(tag, _)| *tag != DT_NULL).collect();
    let Some((_, address)) = entries.iter().find(|(tag, _)| *tag == DT_STRTAB) else { return Ok(true) };
    let Some(strings) = file_offset(*address, segments) else { return Ok(false) };
    for (tag, value) in entries {
        if !matches!(tag, DT_NEEDED | DT_RPATH | DT_RUNPATH) {
            continue;
        }
        let Some(text) = string_at(file, strings.saturating_add(value))? else { return Ok(false) };
        let text = String::from_utf8_lossy(&text).into_owned();
        match tag {
            DT_NEEDED => dynamic.needed.push(text),
            DT_RPATH => dynamic.rpath = Some(text),
            _ => dynamic.runpath = Some(text),
        }
    }
    Ok(true)
}

/// Where in the file the byte at a virtual address is.
fn file_offset(address: u64, segments: &[program_header64::ProgramHeader]) -> Option<u64> {
    segments.iter().filter(|segment| segment.p_type == PT_LOAD).find_map(|segment| {
        let inside = address.checked_sub(segment.p_vaddr).filter(|inside| *inside < segment.p_filesz)?;
        segment.p_offset.checked_add(inside)
    })
}

/// The bytes from `offset` to the next NUL; `None` if there is none in reach.
fn string_at(file: &File, offset: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; MAX_STRING];
    let length = file.read_at(&mut bytes, offset)?;
    bytes.truncate(length);
    let Some(end) = bytes.iter().position(|byte| *byte == 0) else { return Ok(None) };
    bytes.truncate(end);
    Ok(Some(bytes))
}

/// Fills `bytes`; says whether the file was long enough.
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(bytes, offset) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The program named in the first line of a script: for `#!/usr/bin/env NAME`, that is NAME.
pub fn interpreter_of_script(path: &Path) -> Result<Option<PathBuf>, ImageError> {
    let file = File::open(path).map_err(ImageError::io("read", path))?;
    let mut bytes = [0; MAX_SCRIPT_LINE];
    let length = file.read_at(&mut bytes, 0).map_err(ImageError::io("read", path))?;
    let text = bytes.get(..length).and_then(|bytes| bytes.strip_prefix(b"#!"));
    let Some(line) = text.and_then(|text| text.split(|byte| *byte == b'\n').next()) else { return Ok(None) };
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_whitespace();
    let program = words.next().map(PathBuf::from);
    Ok(match program {
        Some(program) if program.ends_with("env") => words.find(|word| !word.starts_with('-')).map(PathBuf::from),
        program => program,
    })
}
