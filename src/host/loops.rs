//! Loop devices: an image file as a block device. See loop(4).
//!
//! An image is never attached twice: two devices on one image do not see each other's writes. So before attaching,
//! callers ask `find`, which looks through the loop devices and compares device and inode, not names.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::busy;
use crate::error::{Context, Error, Result};

/// LOOP_CONFIGURE may lose a race for a free device so many times before we give up.
const ATTEMPTS: u32 = 64;

/// How a device shall behave.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Logical block size in bytes: a power of two, at least what direct I/O to the image needs.
    pub block_size: u32,
    /// Refuse writes.
    pub read_only: bool,
    /// Detach by itself when the last user closes it: right for a file system, whose mount is such a user.
    pub autoclear: bool,
    /// Pass discards on as holes in the image. Where space was set aside they would give it away.
    pub discard: bool,
}

/// An attached device, held open.
#[derive(Debug)]
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub path: PathBuf,
    file: File,
}

/// Attaches the image to a free device, with direct I/O where the image's file system can.
pub fn attach(image: &File, options: Options) -> Result<LoopDevice> {
    let what = || "cannot attach a loop device".to_owned();
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").context(what)?;
    for _ in 0..ATTEMPTS {
        let number = ioctl(control.as_raw_fd(), abi::LOOP_CTL_GET_FREE, 0).context(what)?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let file = OpenOptions::new().read(true).write(!options.read_only).open(&path).context(what)?;
        let mut config = abi::LoopConfig::new(image.as_raw_fd(), options);
        let mut configured = ioctl_ref(file.as_raw_fd(), abi::LOOP_CONFIGURE, &mut config);
        if configured == Err(Errno::INVAL) {
            // A file system without direct I/O, such as tmpfs on older kernels.
            config.info.flags &= !abi::LO_FLAGS_DIRECT_IO;
            configured = ioctl_ref(file.as_raw_fd(), abi::LOOP_CONFIGURE, &mut config);
        }
        match configured {
            Ok(_) => {
                let device = LoopDevice { path, file };
                if !options.discard {
                    device.disable_discard();
                }
                return Ok(device);
            }
            // Somebody else was faster.
            Err(Errno::BUSY) => continue,
            Err(error) => return Err(Error::io(what(), error)),
        }
    }
    Err(Error::io(what(), Errno::BUSY))
}

/// The device that the image is attached to, if it is. Costs one look at each attached loop device.
pub fn find(image: &Path) -> Result<Option<LoopDevice>> {
    let what = || format!("cannot look for the loop device of {}", image.display());
    let wanted = match std::fs::metadata(image) {
        Ok(stat) => (stat.dev(), stat.ino()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context(what),
    };
    // The name that sysfs shows depends on the mount namespace, but not its end.
    let ending: PathBuf = image.components().skip(image.components().count().saturating_sub(2)).collect();
    for entry in std::fs::read_dir("/sys/block").context(what)? {
        let name = entry.context(what)?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with("loop")) else { continue };
        let Ok(backing) = std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")) else { continue };
        if !Path::new(backing.trim_end()).ends_with(&ending) {
            continue;
        }
        if let Some(device) = open(&PathBuf::from(format!("/dev/{name}")))?
            && device.backing()? == Some(wanted)
        {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// The loop device with this device number, such as the one below a mounted file system. `None`: it is no loop device.
pub fn by_number(device: u64) -> Result<Option<LoopDevice>> {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    match std::fs::read_link(format!("/sys/dev/block/{number}")) {
        Ok(link) => match link.file_name().and_then(|name| name.to_str()) {
            Some(name) if name.starts_with("loop") => open(&PathBuf::from(format!("/dev/{name}"))),
            _ => Ok(None),
        },
        Err(_) => Ok(None),
    }
}

/// A device that shows that one and can't be written, for those who may only read. There is one for all of them; it stays
/// until it is detached.
pub fn ensure_read_only_view(device: &Path) -> Result<LoopDevice> {
    if let Some(view) = read_only_view(device)? {
        return Ok(view);
    }
    let what = || format!("cannot open {}", device.display());
    let file = File::open(device).context(what)?;
    let block_size = rustix::fs::ioctl_blksszget(&file).context(what)?;
    attach(&file, Options { block_size, read_only: true, autoclear: false, discard: false })
}

/// The read-only view of a device, if there is one.
pub fn read_only_view(device: &Path) -> Result<Option<LoopDevice>> {
    match std::fs::canonicalize(device) {
        Ok(device) => find(&device),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(|| format!("cannot look at {}", device.display())),
    }
}

fn open(path: &Path) -> Result<Option<LoopDevice>> {
    let what = || format!("cannot open {}", path.display());
    match File::open(path) {
        Ok(file) if file.metadata().context(what)?.file_type().is_block_device() => {
            Ok(Some(LoopDevice { path: path.to_owned(), file }))
        }
        Ok(_) => Ok(None),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => Ok(None),
        Err(error) => Err(error).context(what),
    }
}

impl LoopDevice {
    /// Device and inode of the image. `None`: nothing is attached.
    pub fn backing(&self) -> Result<Option<(u64, u64)>> {
        let mut info = abi::LoopInfo::default();
        match ioctl_ref(self.file.as_raw_fd(), abi::LOOP_GET_STATUS64, &mut info) {
            Ok(_) => Ok(Some((abi::decode_device(info.device), info.inode))),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(Error::io(format!("cannot ask {} for its image", self.path.display()), error)),
        }
    }

    /// Is this image what the device shows?
    pub fn shows(&self, image: &Path) -> Result<bool> {
        match std::fs::metadata(image) {
            Ok(stat) => Ok(self.backing()? == Some((stat.dev(), stat.ino()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).context(|| format!("cannot look at {}", image.display())),
        }
    }

    /// The image's name as sysfs has it: a hint, since it depends on the mount namespace.
    pub fn image_name(&self) -> Option<PathBuf> {
        let name = self.path.file_name()?.to_str()?;
        let text = std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
        Some(PathBuf::from(text.trim_end_matches('\n')))
    }

    /// Is an image still attached?
    fn is_held(&self) -> Result<bool> {
        Ok(self.backing()?.is_some())
    }

    /// Makes the device as big as its image has become.
    pub fn refresh_size(&self) -> Result<()> {
        ioctl(self.file.as_raw_fd(), abi::LOOP_SET_CAPACITY, 0)
            .map(drop)
            .context(|| format!("cannot grow {}", self.path.display()))
    }

    /// Detaches the image, once the last user closes the device. Detached already is fine.
    pub fn detach(&self) -> Result<()> {
        match ioctl(self.file.as_raw_fd(), abi::LOOP_CLR_FD, 0) {
            Ok(_) | Err(Errno::NXIO) => Ok(()),
            Err(error) => Err(Error::io(format!("cannot detach {}", self.path.display()), error)),
        }
    }

    /// Detaches the image now. `false`: somebody else holds the device open, and it goes when they close it.
    pub fn detach_now(&self) -> Result<bool> {
        // Each time anew: it is detached at once only for the last one who has it open, which has to be us.
        let detach = || self.detach().and_then(|()| self.is_held());
        busy::settle(detach, |held| matches!(held, Ok(true))).map(|held| !held)
    }

    /// Best effort: sysfs may be read-only. The pool's books hold without it.
    fn disable_discard(&self) {
        if let Some(name) = self.path.file_name().and_then(|name| name.to_str()) {
            let _ = std::fs::write(format!("/sys/block/{name}/queue/discard_max_bytes"), "0");
        }
    }
}

/// An ioctl that takes a number.
fn ioctl(fd: RawFd, request: libc::Ioctl, argument: libc::c_ulong) -> rustix::io::Result<libc::c_int> {
    #[expect(unsafe_code, reason = "no wrapper of the loop driver's calls is well kept")]
    // SAFETY: the requests used with this function take an integer, so the kernel follows no pointer.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 { Err(last_error()) } else { Ok(result) }
}

/// An ioctl that reads and writes a structure.
fn ioctl_ref<T: abi::Shared>(fd: RawFd, request: libc::Ioctl, argument: &mut T) -> rustix::io::Result<libc::c_int> {
    #[expect(unsafe_code, reason = "no wrapper of the loop driver's calls is well kept")]
    // SAFETY: `Shared` types have the kernel's layout for the request they are used with, and live through the call.
    let result = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(last_error()) } else { Ok(result) }
}

fn last_error() -> Errno {
    Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// Numbers and layouts of `linux/loop.h` and `linux/fs.h`.
mod abi {
    use super::{Options, RawFd};

    pub(super) const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
    pub(super) const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
    pub(super) const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
    pub(super) const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
    pub(super) const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

    const LO_FLAGS_READ_ONLY: u32 = 1;
    const LO_FLAGS_AUTOCLEAR: u32 = 4;
    pub(super) const LO_FLAGS_DIRECT_IO: u32 = 16;

    /// Structures that the kernel reads and writes.
    pub(super) trait Shared {}
    impl Shared for LoopConfig {}
    impl Shared for LoopInfo {}

    /// `struct loop_info64`.
    #[repr(C)]
    pub(super) struct LoopInfo {
        pub(super) device: u64,
        pub(super) inode: u64,
        rdevice: u64,
        offset: u64,
        size_limit: u64,
        number: u32,
        encrypt_type: u32,
        encrypt_key_size: u32,
        pub(super) flags: u32,
        file_name: [u8; 64],
        crypt_name: [u8; 64],
        encrypt_key: [u8; 32],
        init: [u64; 2],
    }

    impl Default for LoopInfo {
        fn default() -> Self {
            Self {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                size_limit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: 0,
                file_name: [0; 64],
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            }
        }
    }

    /// `struct loop_config`.
    #[repr(C)]
    pub(super) struct LoopConfig {
        fd: u32,
        block_size: u32,
        pub(super) info: LoopInfo,
        reserved: [u64; 8],
    }

    impl LoopConfig {
        pub(super) fn new(image: RawFd, options: Options) -> Self {
            let mut info = LoopInfo { flags: LO_FLAGS_DIRECT_IO, ..LoopInfo::default() };
            if options.read_only {
                info.flags |= LO_FLAGS_READ_ONLY;
            }
            if options.autoclear {
                info.flags |= LO_FLAGS_AUTOCLEAR;
            }
            Self { fd: image.cast_unsigned(), block_size: options.block_size, info, reserved: [0; 8] }
        }
    }

    const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);

    /// The kernel's 32-bit device number (`new_encode_dev`) as stat(2) gives it.
    pub(super) fn decode_device(device: u64) -> u64 {
        let device = u32::try_from(device & 0xFFFF_FFFF).unwrap_or_default();
        rustix::fs::makedev((device & 0xF_FF00) >> 8, (device & 0xFF) | ((device >> 12) & 0xF_FF00))
    }
}
