package sanity

// What the kernel holds beneath a directory, and how to make it let go.

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// removeAll takes away the instance's mounts, FUSE processes, loop devices and directory, whatever state they are in.
func (i *instance) removeAll(t *testing.T) {
	// Latest first, since volumes are mounted upon the pool. A volume keeps the pool busy through its loop device, and
	// a killed process for a moment through its files: so again, until nothing is there.
	for range 50 {
		for _, mount := range slices.Backward(mountsBeneath(t, i.dir)) {
			unix.Unmount(mount, unix.UMOUNT_NOFOLLOW)
		}
		// One ends by itself after the unmount, unless it hangs.
		for pid := range fusesBeneath(t, i.dir) {
			unix.Kill(pid, unix.SIGKILL)
		}
		// Looked up only now: an unmount frees the device that mount(8) made, and anyone may have it next.
		for device := range loopsBeneath(t, i.dir) {
			detach(device)
		}
		if len(mountsBeneath(t, i.dir))+len(loopsBeneath(t, i.dir)) == 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	// RemoveAll would empty a file system that is still mounted: slow, and not ours to decide.
	if mounts, loops := mountsBeneath(t, i.dir), loopsBeneath(t, i.dir); len(mounts)+len(loops) > 0 {
		t.Errorf("%s stays, since the kernel does not let go of %q and %q", i.dir, mounts, loops)
		return
	}
	if err := os.RemoveAll(i.dir); err != nil {
		t.Error(err)
	}
}

// mountsBeneath lists the mount points beneath dir, in the order in which they were mounted.
func mountsBeneath(t *testing.T, dir string) []string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var mounts []string
	for line := range strings.Lines(string(table)) {
		// proc_pid_mountinfo(5): the fifth word is the mount point.
		if mount := strings.Fields(line)[4]; strings.HasPrefix(mount, dir+"/") {
			mounts = append(mounts, mount)
		}
	}
	return mounts
}

// fusesBeneath maps the FUSE processes that name something beneath dir, as their mount point or their socket, to their
// command lines: ceph-fuse, and mounters that berth has started.
func fusesBeneath(t *testing.T, dir string) map[int]string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	fuses := map[int]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // ended since
		}
		words := strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
		isMounter := filepath.Base(words[0]) == "berth" && len(words) > 1 && words[1] == "mounter"
		if filepath.Base(words[0]) != "ceph-fuse" && !isMounter {
			continue
		}
		if slices.ContainsFunc(words[1:], func(word string) bool { return strings.HasPrefix(word, dir+"/") }) {
			pid, err := strconv.Atoi(strings.Split(file, "/")[2])
			if err != nil {
				t.Fatal(err)
			}
			fuses[pid] = strings.Join(words, " ")
		}
	}
	return fuses
}

// loopsBeneath maps the loop devices whose backing file is, or was, beneath dir to that file.
func loopsBeneath(t *testing.T, dir string) map[string]string {
	t.Helper()
	backings, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	loops := map[string]string{}
	for _, backing := range backings {
		file, err := os.ReadFile(backing)
		if err != nil {
			continue // detached since
		}
		if strings.HasPrefix(string(file), dir+"/") {
			loops["/dev/"+strings.Split(backing, "/")[3]] = strings.TrimSpace(string(file))
		}
	}
	return loops
}

// detach asks for a loop device to let go of its file; whether it did, loopsBeneath tells.
func detach(loop string) {
	if device, err := os.Open(loop); err == nil {
		unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0)
		device.Close()
	}
}
